"""`TensorRTModel` at the import path of Chinese-CLIP's deployment guide."""

from cn_clip.clip.backends.tensor_rt import TensorRTModel

__all__ = ["TensorRTModel"]
