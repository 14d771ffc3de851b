"""The models as data: architectures (the JSON files of `clip/model_configs`), published and bundled checkpoints."""

import json
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from cn_clip import spelling
from cn_clip.errors import ConfigError

CONFIG_DIR = Path(__file__).parent / "clip" / "model_configs"
BUNDLED_DIR = Path(__file__).parent / "clip" / "bundled"

VisionName = Literal[
    "ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14", "RN50", "RN-Tiny-64", "RN-Small-64", "ViT-Tiny-64"
]
TextName = Literal["RoBERTa-wwm-ext-base-chinese", "RoBERTa-wwm-ext-large-chinese", "RBT3-chinese", "BERT-Tiny-chinese"]
VISION_MODELS: tuple[str, ...] = get_args(VisionName)
TEXT_MODELS: tuple[str, ...] = get_args(TextName)


class UsualLength(int):
    """A context length that nobody asked for: a checkpoint that was trained with another one has its own."""


# Longest text in tokens, [CLS] and [SEP] included, as Chinese-CLIP trains.
CONTEXT_LENGTH = UsualLength(52)


@dataclass(frozen=True)
class VisionConfig:
    """The picture tower. `vision_layers` is a depth (ViT) or four block counts (ResNet, no patch size)."""

    embed_dim: int
    image_resolution: int
    vision_layers: int | tuple[int, ...]
    vision_width: int
    vision_patch_size: int | None
    vision_head_width: int = 64


@dataclass(frozen=True)
class TextConfig:
    """The text tower, a BERT; names as in the configuration files."""

    vocab_size: int
    text_attention_probs_dropout_prob: float
    text_hidden_act: str
    text_hidden_dropout_prob: float
    text_hidden_size: int
    text_initializer_range: float
    text_intermediate_size: int
    text_max_position_embeddings: int
    text_num_attention_heads: int
    text_num_hidden_layers: int
    text_type_vocab_size: int


@dataclass(frozen=True)
class ModelConfig:
    """A whole model: `vision@text`. `info()` is the flat dictionary the constructor of `CLIP` takes."""

    vision: VisionConfig
    text: TextConfig

    def info(self) -> dict[str, Any]:
        """The fields of the configuration files in one dictionary; a head width of 64 goes without saying."""
        vision = asdict(self.vision)
        patch_size, head_width = vision.pop("vision_patch_size"), vision.pop("vision_head_width")
        if head_width != 64:
            vision["vision_head_width"] = head_width
        return {**vision, "vision_patch_size": patch_size, **asdict(self.text)}


@dataclass(frozen=True)
class Published:
    """One checkpoint on the hubs. `vision`, `text` name its architecture; `resolution` is in pixels a side.

    `num_bytes` and `sha256` are those of the file on Hugging Face, as the commit that added it has them; None where
    unknown. `modelscope_organisation` is None where ModelScope is not known to have the file.
    """

    repo: str
    filename: str
    vision: str
    text: str
    resolution: int
    num_bytes: int | None = None
    sha256: str | None = None
    organisation: str = "OFA-Sys"
    modelscope_organisation: str | None = "AI-ModelScope"

    @property
    def huggingface(self) -> str:
        """The repository on Hugging Face."""
        return f"{self.organisation}/{self.repo}"

    @property
    def modelscope(self) -> str | None:
        """The repository on ModelScope, if it is known to be there."""
        return self.modelscope_organisation and f"{self.modelscope_organisation}/{self.repo}"


@dataclass(frozen=True)
class Bundled:
    """One checkpoint in this package. `vision`, `text` name its architecture; `resolution` is in pixels a side."""

    filename: str
    vision: str
    text: str
    resolution: int

    @property
    def path(self) -> Path:
        """Where the file lies."""
        return BUNDLED_DIR / self.filename


DOWNLOAD_ROOT = Path("~/.cache/clip")

_BASE, _LARGE = "RoBERTa-wwm-ext-base-chinese", "RoBERTa-wwm-ext-large-chinese"
PUBLISHED: dict[str, Published] = {
    "ViT-B-16": Published(
        "chinese-clip-vit-base-patch16",
        "clip_cn_vit-b-16.pt",
        "ViT-B-16",
        _BASE,
        224,
        753_196_934,
        "5997ef32c50de18f3ac06eb5d746c324a639053c3bed8f2986f97ebb22b2ecde",
    ),
    "ViT-L-14": Published(
        "chinese-clip-vit-large-patch14",
        "clip_cn_vit-l-14.pt",
        "ViT-L-14",
        _BASE,
        224,
        1_625_135_766,
        "26a0d4ac248fcea33e8c1e32c22a80def0fe9b1770b429129dfcc04bcd978d28",
    ),
    "ViT-L-14-336": Published(
        "chinese-clip-vit-large-patch14-336px",
        "clip_cn_vit-l-14-336.pt",
        "ViT-L-14-336",
        _BASE,
        336,
        1_626_446_358,
        "53b9a3141f14b2e87366b0857ce78ac1c4c99e028d4d3d832ca8107deae0775b",
    ),
    "ViT-H-14": Published(
        "chinese-clip-vit-huge-patch14",
        "clip_cn_vit-h-14.pt",
        "ViT-H-14",
        _LARGE,
        224,
        3_830_716_726,
        "4549b1a9775db38806dfa398e8e97be4e27299b84b71250d8d2ef0472e708aee",
    ),
    "RN50": Published(
        "chinese-clip-rn50",
        "clip_cn_rn50.pt",
        "RN50",
        "RBT3-chinese",
        224,
        308_316_425,
        "b196ee3ee528b70be1158ab1aafb1d2f1c801ad2d9ffb3bae31b0d305f82fc88",
    ),
}

# Checkpoints of the same format and architectures, trained by Tencent on other pictures and texts.
QA_CLIP: dict[str, Published] = {
    "QA-CLIP-RN50": Published(
        "QA-CLIP",
        "QA-CLIP-RN50.pt",
        "RN50",
        "RBT3-chinese",
        224,
        617_738_279,
        "160b11a76276dea9e0044238090ce609134d0e6ee689f53fdd5f9a411dd25069",
        "TencentARC",
        None,
    ),
    "QA-CLIP-ViT-B-16": Published(
        "QA-CLIP",
        "QA-CLIP-base.pt",
        "ViT-B-16",
        _BASE,
        224,
        1_569_891_012,
        "776aad04ac776a2add7af9ac3839962d8702361d4b718a14f52669a77d21ddf8",
        "TencentARC",
        None,
    ),
    "QA-CLIP-ViT-L-14": Published(
        "QA-CLIP",
        "QA-CLIP-large.pt",
        "ViT-L-14",
        _BASE,
        224,
        2_443_404_116,
        "7a94fcafe0d521d22c6fdb88da77cea4caf7f667ef06b3b17e4f1ee9a8e78738",
        "TencentARC",
        None,
    ),
    "QA-CLIP-ViT-L-14-336": Published(
        "QA-CLIP",
        "QA-CLIP-large-336.pt",
        "ViT-L-14-336",
        _BASE,
        336,
        2_444_715_284,
        "c518633db550098b276824b6c183f8e366a2e3943b4bb4f4e6fd3f13d418f15c",
        "TencentARC",
        None,
    ),
}

BUNDLED: dict[str, Bundled] = {
    "Emoji-Tiny": Bundled("emoji_tiny.safetensors", "RN-Small-64", "BERT-Tiny-chinese", 64),
}


def downloadable() -> dict[str, Published]:
    """The models on the hubs by name: Chinese-CLIP's five in its order, then QA-CLIP's."""
    return {**PUBLISHED, **QA_CLIP}


def everything() -> dict[str, Published | Bundled]:
    """All models by name: those on the hubs, then those that come with this package."""
    return {**downloadable(), **BUNDLED}


def available_models() -> list[str]:
    """The names that `load_from_name` takes, in the order of `everything`."""
    return list(everything())


def named(name: str) -> Published | Bundled | None:
    """The published or bundled checkpoint of that name, if there is one."""
    return everything().get(name)


def config_path(name: str) -> Path:
    """Where the configuration of an architecture lies ("ViT-B/16" is "ViT-B-16")."""
    return CONFIG_DIR / f"{name.replace('/', '-')}.json"


@cache
def vision_config(name: str) -> VisionConfig:
    """The picture tower called `name`, e.g. "ViT-B-16"; raises ConfigError for an unknown name."""
    return VisionConfig(**_read(name, VISION_MODELS))


def fetch_resolution(vision_model: str) -> int:
    """Pixels a side that a picture tower takes, also one called "ViT-L/14"; raises ConfigError for an unknown name."""
    return vision_config(vision_model.replace("/", "-")).image_resolution


@cache
def text_config(name: str) -> TextConfig:
    """The text tower called `name`, e.g. "RBT3-chinese"; raises ConfigError for an unknown name."""
    return TextConfig(**_read(name, TEXT_MODELS))


def model_config(vision: str, text: str) -> ModelConfig:
    """Any pair of towers; raises ConfigError for an unknown name."""
    return ModelConfig(vision_config(vision), text_config(text))


def at_resolution(config: ModelConfig, resolution: int) -> ModelConfig:
    """The same model for pictures of another size, in pixels a side; raises ConfigError when no patch grid fits."""
    step = config.vision.vision_patch_size or 32
    if resolution < step or resolution % step:
        raise ConfigError(f"input resolution {resolution}: expected a multiple of {step} for this model")
    return replace(config, vision=replace(config.vision, image_resolution=resolution))


def config_from_info(info: dict[str, Any]) -> ModelConfig:
    """Builds the configuration from the flat dictionary of the configuration files.

    Raises ConfigError for a missing or an unknown field.
    """
    parts = []
    rest = dict(info)
    layers = rest.get("vision_layers")
    if isinstance(layers, str):
        layers = json.loads(layers)
    if isinstance(layers, list):
        layers = tuple(layers)
    rest["vision_layers"] = layers
    for kind in (VisionConfig, TextConfig):
        names = {field.name for field in fields(kind)} & rest.keys()
        try:
            parts.append(kind(**{name: rest.pop(name) for name in names}))
        except TypeError as error:
            raise ConfigError(f"model configuration: {error}") from error
    if rest:
        raise ConfigError(f"model configuration: unknown fields {sorted(rest)}")
    vision, text = parts
    assert isinstance(vision, VisionConfig)
    assert isinstance(text, TextConfig)
    return ModelConfig(vision, text)


def tower_names(config: ModelConfig) -> tuple[str | None, str | None]:
    """The names of the two architectures, None for one without a name; a tower may be at another resolution."""
    wanted = config.vision.image_resolution
    named = {name: vision_config(name) for name in VISION_MODELS}
    exact = [name for name, known in named.items() if known == config.vision]
    resized = [name for name, known in named.items() if replace(known, image_resolution=wanted) == config.vision]
    texts = [name for name in TEXT_MODELS if _text_shape(text_config(name)) == _text_shape(config.text)]
    return next(iter(exact + resized), None), next(iter(texts), None)


def _text_shape(config: TextConfig) -> TextConfig:
    """Without what leaves no trace in a file."""
    return replace(config, text_attention_probs_dropout_prob=0.0, text_hidden_dropout_prob=0.0, text_hidden_act="")


def _read(name: str, known: tuple[str, ...]) -> dict[str, Any]:
    if name.replace("/", "-") not in known:
        raise ConfigError(f"unknown model {name!r}; expected one of {', '.join(known)}{spelling.meant(name, known)}")
    values: dict[str, Any] = json.loads(config_path(name).read_text(encoding="utf-8"))
    if isinstance(values.get("vision_layers"), list):
        values["vision_layers"] = tuple(values["vision_layers"])
    return values
