"""Commands that turn a user's files into the dataset layout and the weight files of this package."""

if __name__ == "preprocess":  # found in cn_clip/, which is on the path
    from cn_clip import drop_in

    drop_in.lead(__name__)
