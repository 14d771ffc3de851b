"""The HTTP service: vectors as OpenAI's clients ask for them, zero-shot labels, and search over an index."""
