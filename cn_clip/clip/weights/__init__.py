"""Files of weights: one reader for every kind, writing, conversion, adapters, downloads."""
