"""`python -m cn_clip` is `cn-clip`."""

from cn_clip.cli import main

if __name__ == "__main__":
    main()
