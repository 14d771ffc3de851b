"""The commands on weight files: what is in one, what of it is needed, the mean of several, another format."""
