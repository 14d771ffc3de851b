"""Vectors with their ids: computed, kept while they are computed, and read and written as files."""
