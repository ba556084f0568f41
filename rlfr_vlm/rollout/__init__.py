"""Sampling responses: the engines, and the proof that an engine holds the policy's weights."""
