"""The mathematics: losses, advantages, shaping, credit and the objective, as functions of what they
are given.
"""
