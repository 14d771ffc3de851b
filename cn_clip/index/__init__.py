"""Indexes of pictures: the commands that build, change, check and search them."""
