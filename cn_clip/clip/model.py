"""The two-tower model `CLIP`, its weight types, and the import path Chinese-CLIP users know."""

# B batch of pictures, T batch of texts, L tokens, R resolution, E embedding

import math
from typing import Any

import torch
from torch import Tensor, nn

from cn_clip.clip.bert import BertModel
from cn_clip.clip.checkpoint import convert_state_dict, resize_position_embedding
from cn_clip.clip.layers import SelfAttention
from cn_clip.clip.resnet import ModifiedResNet
from cn_clip.clip.vit import VisualTransformer
from cn_clip.errors import ConfigError
from cn_clip.processes import compute_alone_in_children
from cn_clip.zoo import ModelConfig, VisionConfig, config_from_info

__all__ = [
    "CLIP",
    "convert_models_to_fp32",
    "convert_state_dict",
    "convert_weights",
    "resize_pos_embed",
]

PAD_ID = 0
INITIAL_LOGIT_SCALE = math.log(1 / 0.07)


class CLIP(nn.Module):
    """Picture tower `visual`, text tower `bert`, one space of `embed_dim` dimensions.

    Takes the fields of the configuration files as keywords (`CLIP(**model_info)`). `use_flash_attention` is accepted
    and changes nothing: PyTorch's scaled_dot_product_attention uses FlashAttention where it can.
    """

    def __init__(self, *, use_flash_attention: bool = False, **model_info: Any) -> None:
        super().__init__()
        compute_alone_in_children()
        del use_flash_attention
        self.config: ModelConfig = config_from_info(model_info)
        self.visual = _picture_tower(self.config.vision)
        self.bert = BertModel(self.config.text)
        width, embed_dim = self.config.text.text_hidden_size, self.config.vision.embed_dim
        self.text_projection = nn.Parameter(torch.randn(width, embed_dim) * width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(INITIAL_LOGIT_SCALE))
        self.logit_bias: nn.Parameter | None
        self.register_parameter("logit_bias", None)

    @classmethod
    def from_config(cls, config: ModelConfig) -> "CLIP":
        """A model with random weights."""
        return cls(**config.info())

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights, and of the features."""
        dtype: torch.dtype = self.visual.conv1.weight.dtype
        return dtype

    @property
    def resolution(self) -> int:
        """Pixels a side that the picture tower takes."""
        return self.visual.input_resolution

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In training, keeps only the input of each layer and computes the rest again in the backward pass."""
        self.visual.set_grad_checkpointing(enable)
        self.bert.set_grad_checkpointing(enable)

    def add_logit_bias(self) -> None:
        """Prepares scale and bias for the sigmoid loss, which alone uses the bias. Source: arXiv:2303.15343, fig. 1."""
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))
        self.logit_scale.data.fill_(math.log(10))

    def encode_image(self, image: Tensor, mask_ratio: float = 0) -> Tensor:
        """Picture features (B, E) in the type of the weights, not normalised.

        image: (B, 3, R, R), normalised pixels. mask_ratio: share of patches dropped (ViT only; a ResNet ignores it).
        Raises ConfigError when the size is not the model's resolution.
        """
        if image.ndim != 4 or image.shape[1:] != (3, self.resolution, self.resolution):
            raise ConfigError(
                f"pictures of shape {tuple(image.shape)}; this model takes (B, 3, {self.resolution}, {self.resolution})"
            )
        image = image.to(self.dtype)
        if isinstance(self.visual, ModifiedResNet):
            features: Tensor = self.visual(image)
        else:
            features = self.visual(image, mask_ratio)
        return features

    def encode_text(self, text: Tensor) -> Tensor:
        """Text features (T, E) in the type of the weights, not normalised. text: int64 (T, L), 0 is padding."""
        hidden = self.bert.hidden_states(text, text.ne(PAD_ID), first_only=True)
        features: Tensor = hidden[:, 0].to(self.dtype) @ self.text_projection
        return features

    def forward(self, image: Tensor | None, text: Tensor | None, mask_ratio: float = 0) -> Any:
        """Unit rows and scale `(image_BE, text_TE, exp(logit_scale))`; with one input None, raw features of the other.

        Raises ConfigError when both are None.
        """
        if image is None and text is None:
            raise ConfigError("text and image cannot both be None")
        if image is None:
            assert text is not None
            return self.encode_text(text)
        if text is None:
            return self.encode_image(image)
        return (
            _unit(self.encode_image(image, mask_ratio)),
            _unit(self.encode_text(text)),
            self.logit_scale.exp(),
        )

    def get_similarity(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines times exp(logit_scale): `(logits_per_image (B, T), logits_per_text (T, B))`."""
        image_BE, text_TE, scale = self(image, text)
        logits_per_image = scale * image_BE @ text_TE.t()
        return logits_per_image, logits_per_image.t()


def _picture_tower(config: VisionConfig) -> ModifiedResNet | VisualTransformer:
    layers = config.vision_layers
    if not isinstance(layers, int):
        return ModifiedResNet(
            layers=layers,
            output_dim=config.embed_dim,
            heads=config.vision_width * 32 // config.vision_head_width,
            input_resolution=config.image_resolution,
            width=config.vision_width,
        )
    if config.vision_patch_size is None:
        raise ConfigError("vision_patch_size: a Vision Transformer needs one")
    return VisualTransformer(
        input_resolution=config.image_resolution,
        patch_size=config.vision_patch_size,
        width=config.vision_width,
        layers=layers,
        heads=config.vision_width // config.vision_head_width,
        output_dim=config.embed_dim,
    )


def _unit(rows: Tensor) -> Tensor:
    return rows.div(rows.norm(dim=-1, keepdim=True))


def convert_weights(model: nn.Module, dtype: torch.dtype = torch.float16) -> None:
    """Turns matrix and convolution weights, the whole text tower and the projections into `dtype`, in place.

    Normalisation of the picture tower and the logit scale stay float32, as in the checkpoints of Chinese-CLIP.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear, SelfAttention, BertModel)):
            module.to(dtype)
        for name in ("text_projection", "proj"):
            parameter = getattr(module, name, None)
            if isinstance(parameter, nn.Parameter):
                parameter.data = parameter.data.to(dtype)


def convert_models_to_fp32(model: nn.Module) -> None:
    """Turns every parameter and gradient into float32, in place."""
    model.float()


def resize_pos_embed(state_dict: dict[str, Tensor], model: nn.Module, prefix: str = "") -> None:
    """Fits the position embedding of a ViT in `state_dict` to the resolution of `model`, in place."""
    inner = model.module if isinstance(getattr(model, "module", None), nn.Module) else model
    assert isinstance(inner, CLIP)
    key = f"{prefix}visual.positional_embedding"
    if key in state_dict and isinstance(inner.visual, VisualTransformer):
        state_dict[key] = resize_position_embedding(state_dict[key], inner.visual.grid_size[0])
