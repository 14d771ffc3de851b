"""Commands that turn a user's files into the dataset layout and the weight files of this package."""
