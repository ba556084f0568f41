"""Image benchmarks through VLMEvalKit."""
