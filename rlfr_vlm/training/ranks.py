"""Moved to rlfr_vlm.ranks."""

from rlfr_vlm.ranks import Launch, Ranks, check_launch, join, launched, listen  # noqa: F401
