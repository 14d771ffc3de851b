"""Chinese-CLIP: pictures and Chinese text in one vector space. The API is in `cn_clip.clip`."""

__version__ = "2.0.0"
