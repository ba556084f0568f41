"""Fitting the flow field before RL, and asking what it is worth."""
