"""Evaluation as functions of arrays, and what the commands of `eval` share: models, benchmarks, labelled pictures."""
