"""The flow field on the policy's latents, and the token reward read from it (RLFR,
arXiv:2510.10201).
"""
