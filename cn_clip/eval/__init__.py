"""The commands of features, retrieval and classification; `features` and `evaluation` do their work."""

if __name__ == "eval":  # found in cn_clip/, which is on the path
    from cn_clip import drop_in

    drop_in.lead(__name__)
