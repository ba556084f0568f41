"""The policy: one backbone class for language and vision-language models."""
