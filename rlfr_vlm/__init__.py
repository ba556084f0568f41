"""Post-train language and vision-language models to reason: GRPO with flow rewards (RLFR,
arXiv:2510.10201).
"""

__version__ = "0.1.0"
