"""Evaluation as functions over arrays and values: recall, classification, benchmarks; for the commands of `eval`."""
