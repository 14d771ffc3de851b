"""Search over vectors; knows nothing of pictures, text or models."""
