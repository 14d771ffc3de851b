"""Commands that export models for deployment, and measure how fast they run."""

if __name__ == "deploy":  # found in cn_clip/, which is on the path
    from cn_clip import drop_in

    drop_in.lead(__name__)
