"""Features, retrieval and zero-shot evaluation: the commands and the pure functions they call."""
