"""Rewards: the answer grader, what a response earns."""
