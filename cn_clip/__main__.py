"""`python -m cn_clip` is `cn-clip`."""

from cn_clip_next import main

if __name__ == "__main__":
    main()
