"""Models of other families, of transformers and of open_clip, as parts of an `Encoder`."""
