"""The training loop and what keeps a run alive."""
