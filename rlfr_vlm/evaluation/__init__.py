"""Measuring the policy."""
