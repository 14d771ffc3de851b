"""Models of some ten thousand parameters with random weights, for tests that need a whole model but no good one."""

import torch

from cn_clip.clip.model import CLIP
from cn_clip.zoo import ModelConfig, TextConfig, VisionConfig

TEXT = TextConfig(
    vocab_size=40,
    text_attention_probs_dropout_prob=0.1,
    text_hidden_act="gelu",
    text_hidden_dropout_prob=0.1,
    text_hidden_size=64,
    text_initializer_range=0.02,
    text_intermediate_size=96,
    text_max_position_embeddings=512,
    text_num_attention_heads=1,
    text_num_hidden_layers=2,
    text_type_vocab_size=2,
)
VIT = VisionConfig(embed_dim=24, image_resolution=32, vision_layers=2, vision_width=64, vision_patch_size=8)
RESNET = VisionConfig(
    embed_dim=24, image_resolution=64, vision_layers=(1, 2, 1, 1), vision_width=8, vision_patch_size=None
)
CONFIGS = {"vit": ModelConfig(VIT, TEXT), "resnet": ModelConfig(RESNET, TEXT)}


def tiny_model(kind: str = "vit", *, seed: int = 0) -> CLIP:
    """A model in eval mode; every tensor, also those of normalisations, differs from its initial value."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIP.from_config(CONFIGS[kind])
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.data += torch.rand_like(buffer)
    return model.eval()


def tiny_pixels(model: CLIP, count: int = 3) -> torch.Tensor:
    """Pixels (count, 3, R, R)."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(count, 3, model.resolution, model.resolution, generator=generator)


# Token ids of three texts of different lengths: 2 is [CLS], 3 is [SEP] of the tiny vocabulary, 0 is padding.
TOKENS = torch.tensor([[2, 5, 6, 7, 3], [2, 8, 3, 0, 0], [2, 3, 0, 0, 0]])
