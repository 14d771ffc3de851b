"""Features, retrieval and zero-shot evaluation: the commands and the pure functions they call."""

if __name__ == "eval":  # found in cn_clip/, which is on the path
    from cn_clip import drop_in

    drop_in.lead(__name__)
