"""The two-tower model `CLIP`, its weight types, and the import path Chinese-CLIP users know."""

# B batch of pictures, T batch of texts, L tokens, R resolution, E embedding

import collections.abc
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cn_clip.clip import _tokenizer
from cn_clip.clip.bert import BertModel
from cn_clip.clip.configuration_bert import BertConfig
from cn_clip.clip.layers import LayerNorm, QuickGELU
from cn_clip.clip.transforms import normalised
from cn_clip.clip.visual import (
    AttentionPool2d,
    Bottleneck,
    ModifiedResNet,
    ResidualAttentionBlock,
    Transformer,
    VisualTransformer,
)
from cn_clip.clip.weights.base import fingerprint
from cn_clip.clip.weights.checkpoint import convert_state_dict, fit, normalise_keys, resize_position_embedding
from cn_clip.errors import CheckpointError, ConfigError
from cn_clip.processes import compute_alone_in_children
from cn_clip.zoo import ModelConfig, config_from_info

__all__ = [
    "CLIP",
    "AttentionPool2d",
    "BertConfig",
    "BertModel",
    "Bottleneck",
    "LayerNorm",
    "ModifiedResNet",
    "QuickGELU",
    "ResidualAttentionBlock",
    "Transformer",
    "VisualTransformer",
    "convert_models_to_fp32",
    "convert_state_dict",
    "convert_weights",
    "resize_pos_embed",
    "restore_model",
]

logger = logging.getLogger(__name__)

PAD_ID = 0
INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
# How the keys of each side begin.
PICTURE_SIDE, TEXT_SIDE = ("visual.", "logit_scale"), ("bert.",)


class CLIP(nn.Module):
    """Picture tower `visual`, text tower `bert`, one space of `embed_dim` dimensions.

    Takes the fields of the configuration files by name (`CLIP(**model_info)`) or in the order of Chinese-CLIP.
    tokenizer: its `vocab["[PAD]"]` is the id of padding. `use_flash_attention` changes nothing: `layers.attend` says
    which kernel computes the attention of each tower.
    """

    def __init__(
        self,
        embed_dim: int,
        image_resolution: int,
        vision_layers: int | Sequence[int],
        vision_width: int,
        vision_patch_size: int | None,
        vocab_size: int,
        text_attention_probs_dropout_prob: float,
        text_hidden_act: str,
        text_hidden_dropout_prob: float,
        text_hidden_size: int,
        text_initializer_range: float,
        text_intermediate_size: int,
        text_max_position_embeddings: int,
        text_num_attention_heads: int,
        text_num_hidden_layers: int,
        text_type_vocab_size: int,
        tokenizer: Any = _tokenizer,
        vision_head_width: int = 64,
        use_flash_attention: bool = False,
    ) -> None:
        info = {name: value for name, value in locals().items() if name not in _NO_FIELDS}
        super().__init__()
        compute_alone_in_children()
        self.config: ModelConfig = config_from_info(info)
        vision = self.config.vision
        layers, width = vision.vision_layers, vision.vision_width
        self.visual: ModifiedResNet | VisualTransformer
        if not isinstance(layers, int):
            heads = width * 32 // vision.vision_head_width
            self.visual = ModifiedResNet(layers, vision.embed_dim, heads, vision.image_resolution, width)
        else:
            if vision.vision_patch_size is None:
                raise ConfigError("vision_patch_size: a Vision Transformer needs one")
            heads = width // vision.vision_head_width
            sizes = (vision.image_resolution, vision.vision_patch_size, width, layers, heads, vision.embed_dim)
            self.visual = VisualTransformer(*sizes, use_flash_attention)
        fields = {name.removeprefix("text_"): value for name, value in asdict(self.config.text).items()}
        self.bert_config = BertConfig(fields.pop("vocab_size"), **fields, use_flash_attention=use_flash_attention)
        self.bert = BertModel(self.bert_config)
        self.text_projection = nn.Parameter(torch.empty(text_hidden_size, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(INITIAL_LOGIT_SCALE))
        self.logit_bias: nn.Parameter | None
        self.register_parameter("logit_bias", None)
        self.tokenizer = tokenizer
        self.context_length: int | None = None  # what its checkpoint says of the longest text it was trained with
        self.matryoshka: tuple[int, ...] = ()  # and where its vectors may be cut
        self.initialize_parameters()

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that tell these weights from others."""
        return fingerprint(self.state_dict().items())

    def initialize_parameters(self) -> None:
        """Draws the projections and a ResNet's attention pool anew, zeroes what it begins its blocks with."""
        self.logit_scale.data.fill_(INITIAL_LOGIT_SCALE)
        if isinstance(self.visual, ModifiedResNet):
            self.visual.initialize_parameters()
        nn.init.normal_(self.text_projection, std=self.bert_config.hidden_size**-0.5)

    @property
    def tokenizer(self) -> Any:
        """What the model's texts are made with; only its id of padding counts here."""
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        vocab = None if tokenizer is _tokenizer else getattr(tokenizer, "vocab", None)
        self._pad_id = PAD_ID if vocab is None else vocab["[PAD]"]

    def has_padding(self, token_ids: "npt.NDArray[np.int64]") -> bool:
        """Whether a row of token ids has padding."""
        return bool((token_ids == self._pad_id).any())

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
        """Prepares scale and bias for the sigmoid loss; no other uses the bias. Source: arXiv:2303.15343, fig. 1."""
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))
        self.logit_scale.data.fill_(math.log(10))

    def encode_image(self, image: Tensor, mask_ratio: float = 0) -> Tensor:
        """Picture features (B, E) in the type of the weights, not normalised.

        image: (B, 3, R, R), normalised pixels, or uint8 ones, which `transforms.normalised` makes such here.
        mask_ratio: share of patches dropped (ViT only; a ResNet ignores it).
        Raises ConfigError when the size is not the model's resolution.
        """
        image = normalised(image).to(self.dtype)
        takes_ratio = mask_ratio and not isinstance(self.visual, ModifiedResNet)
        features: Tensor = self.visual(image, mask_ratio) if takes_ratio else self.visual(image)
        return features

    def encode_text(self, text: Tensor, *, padded: bool = True) -> Tensor:
        """Text features (T, E) in the type of the weights, not normalised. text: int64 (T, L), 0 is padding.

        padded: False when it is known, without asking a GPU, that no row has padding; a GPU then needs no mask.
        """
        # A program may have replaced the tower by a module of its own.
        ours = isinstance(self.bert, BertModel)
        options = {"first_only": True} if ours and self.bert.class_token_suffices() else {}
        mask = text.ne(self._pad_id).to(self.dtype) if padded or not ours else None
        hidden: Tensor = self.bert(text, attention_mask=mask, **options)[0]
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


# The arguments of CLIP that are no fields of a configuration file.
_NO_FIELDS = ("self", "tokenizer", "use_flash_attention", "__class__")


def _unit(rows: Tensor) -> Tensor:
    return rows.div(rows.norm(dim=-1, keepdim=True))


def convert_weights(model: nn.Module, dtype: torch.dtype = torch.float16) -> None:
    """Turns matrix and convolution weights, the whole text tower and the projections into `dtype`, in place.

    Normalisation of the picture tower and the logit scale stay float32, as in the checkpoints of Chinese-CLIP.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear, nn.MultiheadAttention, BertModel)):
            module.to(dtype)
        for name in ("text_projection", "proj"):
            parameter = getattr(module, name, None)
            if isinstance(parameter, nn.Parameter):
                parameter.data = parameter.data.to(dtype)


def convert_models_to_fp32(model: nn.Module) -> None:
    """Turns every parameter and gradient into float32, in place."""
    model.float()


def resize_pos_embed(
    state_dict: dict[str, Tensor], model: nn.Module, interpolation: str = "bicubic", seq_dim: int = 1, prefix: str = ""
) -> None:
    """Fits the position embedding of a ViT in `state_dict` to the resolution of `model`, in place.

    interpolation: a mode of `torch.nn.functional.interpolate` that aligns corners. `seq_dim` changes nothing.
    """
    del seq_dim
    inner: Any = model.module if hasattr(model, "module") else model
    key = f"{prefix}visual.positional_embedding"
    if key in state_dict and hasattr(inner.visual, "grid_size"):
        side, _ = to_2tuple(inner.visual.grid_size)
        state_dict[key] = resize_position_embedding(state_dict[key], side, interpolation)


def _ntuple(n: int) -> Callable[[Any], Any]:
    def parse(x: Any) -> Any:
        """`x` if it can be iterated over, else a tuple that holds it n times."""
        return x if isinstance(x, collections.abc.Iterable) else tuple(repeat(x, n))

    return parse


to_1tuple, to_2tuple, to_3tuple, to_4tuple = map(_ntuple, (1, 2, 3, 4))


def to_ntuple(n: int, x: Any) -> Any:
    """`x` if it can be iterated over, else a tuple that holds it n times."""
    return _ntuple(n)(x)


def initialise(model: CLIP, tensors: Mapping[str, Tensor], prefixes: tuple[str, ...], path: Path) -> None:
    """Gives a model the tensors whose keys begin with `prefixes`; raises CheckpointError naming `path`.

    It does so when there are none of them, or their shapes differ; those that the model lacks are warned about.
    """
    part = {key: value for key, value in tensors.items() if key.startswith(prefixes)}
    state = model.state_dict()
    homeless = part.keys() - state.keys()
    if len(homeless) == len(part):
        raise CheckpointError(f"holds no tensor named {' or '.join(prefixes)}…; nothing to initialise with", at=path)
    if homeless:
        logger.warning("%s: %d tensors have no place in this model, e.g. %s", path, len(homeless), min(homeless))
    known = {key: value for key, value in part.items() if key in state}
    model.load_state_dict(fit(known, {key: state[key] for key in known}, path), strict=False)


def restore_model(
    model: CLIP,
    clip_state_dict: Mapping[str, Tensor] | None,
    bert_state_dict: Mapping[str, Tensor] | None,
    use_flash_attention: bool,
) -> CLIP:
    """`loading.load` from dictionaries instead of files, on the device the model is on; None leaves a side as it is."""
    del use_flash_attention
    for tensors, prefixes, name in (
        (clip_state_dict, PICTURE_SIDE, "clip_state_dict"),
        (bert_state_dict, TEXT_SIDE, "bert_state_dict"),
    ):
        if tensors is not None:
            initialise(model, normalise_keys(tensors), prefixes, Path(name))
    return model.eval()
