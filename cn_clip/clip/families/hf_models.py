"""Models of transformers: the table of families, and folders of them, run by transformers itself.

Pictures go through the processor of the folder and texts through its tokenizer: nothing of them is repeated here.
Code that comes with a folder is never run, and pickled weights are read only by `torch.load(weights_only=True)`.
"""

# B batch, R resolution, L tokens, D embedding, N patches, V values of a patch

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cn_clip.clip.backends.base import Inputs, Pixels, TokenIds
from cn_clip.clip.backends.pytorch import ForeignTowers
from cn_clip.clip.blocks import HEADER, write_block
from cn_clip.clip.families import fg_clip_2, naflex
from cn_clip.clip.families.rgb import RgbPictures
from cn_clip.clip.transforms import Decode, draft_side, shape_of
from cn_clip.clip.weights.file_kinds import what_it_is
from cn_clip.clip.weights.hf import CONFIG_FILE, read_json
from cn_clip.errors import CheckpointError, CnClipError, ConfigError, MissingExtraError, first_sentence, reading
from cn_clip.extras import install_command, require

_VISUAL_PARTS = ("vision_model.", "visual_projection.")


@dataclass(frozen=True)
class Family:
    """How the inputs of a family were made when it was trained, where its folders do not say it, and who loads it.

    is_masked: padding is hidden from attention; if it is not, attention is causal, or the tower was trained with it.
    None: as the folder's tokenizer has it. is_full: every text is padded to the longest that the tower takes.
    is_lower_cased: the tower never saw upper case, whether or not the folder's tokenizer sees to that: those of
    SigLIP 2 do not (arXiv 2502.14786). has_spare_positions: as in RoBERTa, the first position embeddings, one more than
    the id of padding, belong to no text. processor: of pictures, if the folder does not name one.
    read_config, load: of a folder; default, what `AutoConfig` and `AutoModel` open. long_texts: the field of the text
    config that says how long texts are in a second way of reading them, which `load` is told of. num_patches: how many
    patches a picture of a width and height gets at most; default, what the processor has.
    """

    is_masked: bool | None = False
    is_full: bool = False
    is_lower_cased: bool = False
    has_spare_positions: bool = False
    processor: str = "CLIPImageProcessor"
    read_config: Callable[..., Any] | None = None
    load: Callable[..., Any] | None = None
    long_texts: str = ""
    num_patches: Callable[[int, int], int] | None = None


# By the `model_type` of config.json.
FAMILIES = {
    "clip": Family(),
    "siglip": Family(is_full=True, is_lower_cased=True, processor="SiglipImageProcessor"),
    "siglip2": Family(is_full=True, is_lower_cased=True, processor="Siglip2ImageProcessor"),
    "fgclip2": Family(
        is_masked=None,
        is_full=True,
        is_lower_cased=True,
        processor="Siglip2ImageProcessor",
        read_config=fg_clip_2.read_config,
        load=fg_clip_2.load,
        long_texts="longtext_len",
        num_patches=fg_clip_2.num_patches,
    ),
    "tipsv2": Family(is_masked=True, is_full=True, processor="Tipsv2ImageProcessor"),
    "altclip": Family(is_masked=True, has_spare_positions=True),
    "metaclip_2": Family(),
    "chinese_clip": Family(is_masked=True, processor="ChineseCLIPImageProcessor"),
}
# Of each image processor the one over PIL, and what it does unless a folder says otherwise. Those over torchvision,
# which AutoImageProcessor needs, resize a little differently. That of TIPSv2 is only there over torchvision.
PROCESSORS: dict[str, tuple[str, Mapping[str, object]]] = {
    "CLIPImageProcessor": ("CLIPImageProcessorPil", {}),
    "ChineseCLIPImageProcessor": ("ChineseCLIPImageProcessorPil", {}),
    "SiglipImageProcessor": ("SiglipImageProcessorPil", {}),
    "Siglip2ImageProcessor": ("Siglip2ImageProcessorPil", {}),
    "Tipsv2ImageProcessor": (
        "SiglipImageProcessorPil",
        {"do_normalize": False, "resample": 2, "size": {"height": 448, "width": 448}},
    ),
}
# The most patches of a picture that a folder may ask for: their attention takes memory with the square.
MOST_PATCHES = 4096


class ProcessedPictures(RgbPictures):
    """A folder's image processor as a `PictureTransform`: normalised pixels (3, R, R)."""

    def __init__(self, processor: Any, decode: Decode) -> None:
        super().__init__(decode)
        self._processor = processor
        self.shape = self._pixels(Image.new("RGB", (3, 2))).shape
        self.resolution = self.shape[-1]

    @property
    def draft_size(self) -> int | None:
        """As of `RgbPictures`, of what the processor scales to before it cuts."""
        size = getattr(self._processor, "size", None) or {}
        return draft_side(self.decode, int(size.get("shortest_edge") or self.resolution))

    def _write(self, image: Image.Image, out: Pixels) -> None:
        out[...] = self._pixels(image)

    def _pixels(self, image: Image.Image) -> Pixels:
        pixels: Pixels = self._processor(images=[image], return_tensors="np")["pixel_values"][0]
        return pixels


class PatchedPictures(RgbPictures):
    """A folder's image processor that keeps proportions (NaFlex) as a `PictureTransform`: blocks of patches."""

    def __init__(self, processor: Any, decode: Decode, num_patches: Callable[[int, int], int] | None = None) -> None:
        """num_patches: the most patches of a picture by its width and height; default, what the processor has."""
        super().__init__(decode)
        self._processor, self._num_patches = processor, num_patches
        most, side = self._patches_of(10**9, 10**9), int(processor.patch_size)  # however large the picture is
        self.shape = (HEADER + most, 3 * side * side)
        self.resolution = side * math.isqrt(most)

    def _write(self, image: Image.Image, out: Pixels) -> None:
        made = self._processor(images=[image], return_tensors="np", max_num_patches=self._patches_of(*image.size))
        height, width = made["spatial_shapes"][0].tolist()
        write_block(made["pixel_values"][0], (height, width), out)

    def _patches_of(self, width: int, height: int) -> int:
        return self._num_patches(width, height) if self._num_patches else int(self._processor.max_num_patches)


class TokenizedTexts:
    """A folder's tokenizer as a `TextTransform`."""

    def __init__(self, tokenizer: Any, *, context_length: int, is_full: bool, is_lower_cased: bool = False) -> None:
        self._tokenizer, self.context_length, self.is_full = tokenizer, context_length, is_full
        self.is_lower_cased = is_lower_cased
        self.pad_id = int(tokenizer.pad_token_id or 0)

    @property
    def has_mask(self) -> bool:
        """Whether the tokenizer says that its padding is hidden from attention."""
        return "attention_mask" in self._tokenizer.model_input_names

    def rows(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special ones included, cut at the model's length."""
        if not texts:
            return []
        given = [text.lower() for text in texts] if self.is_lower_cased else list(texts)
        encoded = self._tokenizer(given, truncation=True, max_length=self.context_length, padding=False)
        rows: list[list[int]] = encoded["input_ids"]
        return rows

    def pad(self, rows: Sequence[Sequence[int]]) -> TokenIds:
        """Rows of different lengths as one int64 array (B, L)."""
        length = self.context_length if self.is_full else max(map(len, rows), default=0)
        filled = [[*row, *[self.pad_id] * (length - len(row))] for row in rows]
        return np.array(filled, dtype=np.int64).reshape(len(rows), length)


@dataclass(frozen=True)
class Folder:
    """A folder of transformers whose family is known; see `read_folder`."""

    path: Path
    config: Mapping[str, Any]
    family: Family
    library: Any

    @property
    def lengths(self) -> list[int]:
        """How long texts may be in tokens, by the config: the usual length, and that of a second way of reading."""
        text, family = self.config.get("text_config") or {}, self.family
        return [int(text[family.long_texts])] if family.long_texts and family.long_texts in text else []

    def open_inputs(self, *, decode: Decode = "exact", context_length: int | None = None) -> Inputs:
        """The processor and the tokenizer. context_length: of a text in tokens; default, the usual one.

        Raises CheckpointError for files that cannot be read or do not fit, ConfigError for another length.
        """
        with _explained(self.library, self.path):
            config = self._read_config()
            pictures = _open_pictures(self.library, self.path, self.family, config.vision_config, decode)
            tokenizer = self.library.AutoTokenizer.from_pretrained(
                self.path, local_files_only=True, trust_remote_code=False
            )
            longest = _longest(config.text_config, tokenizer, self.family)
            if context_length is not None:
                if context_length not in (longest, *self.lengths):
                    known = " or ".join(map(str, (longest, *self.lengths)))
                    raise ConfigError(
                        f"context_length {context_length}: this model cuts texts at {known} tokens of its own; "
                        "leave it out"
                    )
                longest = context_length
            family = self.family
            texts = TokenizedTexts(
                tokenizer, context_length=longest, is_full=family.is_full, is_lower_cased=family.is_lower_cased
            )
        return Inputs(pictures, texts)

    def open_towers(
        self, inputs: Inputs, *, device: torch.device, precision: str = "fp32", num_threads: int | None = None
    ) -> ForeignTowers:
        """The model in PyTorch. inputs: those of this folder.

        Raises CheckpointError for weights that are missing or do not fit, or a folder that asks for code of its own.
        """
        texts = inputs.texts
        assert isinstance(texts, TokenizedTexts), "is of this folder"
        with _explained(self.library, self.path):
            model = self._load_model(texts.context_length)
            is_masked = texts.has_mask if self.family.is_masked is None else self.family.is_masked
            shape = shape_of(inputs.pictures)
            is_patched = isinstance(inputs.pictures, PatchedPictures)
            if is_patched:
                naflex.prepare(model)
            towers = ForeignTowers(
                model,
                encode_image=partial(_block_tower if is_patched else _image_tower, model),
                encode_text=partial(_text_tower, model, texts.pad_id if is_masked else None),
                resolution=inputs.pictures.resolution,
                shape=shape,
                logit_scale=_logit_scale(model),
                visual_parts=_VISUAL_PARTS,
                device=device,
                precision=precision,
                num_threads=num_threads,
            )
            towers.encode_tokens(texts.pad(texts.rows(["一"])))  # what fails with every text fails here
        return towers

    def _read_config(self) -> Any:
        if self.family.read_config:
            return self.family.read_config(self.library, self.config)
        return self.library.AutoConfig.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)

    def _load_model(self, context_length: int) -> Any:
        settings: dict[str, Any] = {
            "local_files_only": True,
            "weights_only": True,
            "use_safetensors": True if any(self.path.glob("*.safetensors")) else None,
            "dtype": torch.float32,
            "output_loading_info": True,
        }
        if self.family.load:
            model, found = self.family.load(self.library, self.path, self.config, context_length, **settings)
        else:
            model, found = self.library.AutoModel.from_pretrained(self.path, trust_remote_code=False, **settings)
        # transformers would go on, with random values instead of them.
        for what in ("missing_keys", "mismatched_keys"):
            if wrong := sorted(map(str, found.get(what) or ())):
                listed = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
                raise CheckpointError(
                    f"the weights do not fit config.json: {what.replace('_', ' ')} {listed}", at=self.path
                )
        return model


def read_folder(path: Path) -> Folder:
    """A transformers folder.

    Raises CheckpointError for one of another family, naming those that are known; MissingExtraError without
    transformers.
    """
    config = read_json(path / CONFIG_FILE)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        more = ", and code that comes with a folder is not run" if "auto_map" in config else ""
        raise CheckpointError(
            f"is of the family {kind!r}, expected one of {', '.join(sorted(FAMILIES))}{more}; if sentence-transformers "
            f"opens it, use st:{path}",
            at=path,
        )
    transformers: Any = require("transformers", extra="hf", purpose=f"hf:{path}")
    version = transformers.__version__
    if int(version.split(".")[0]) < 5:  # 4.57 fails on the texts of a ChineseCLIPModel, and has other processors
        raise MissingExtraError(
            f"hf:{path}: needs transformers 5, {version} is installed; install it with: {install_command('hf')}"
        )
    if (path / "spiece.model").is_file():
        # Without it transformers 5 takes another tokenizer of the folder, which leaves out what SigLIP does to a text.
        require("sentencepiece", extra="hf", purpose=f"hf:{path}")
    return Folder(path, config, FAMILIES[kind], transformers)


def _open_pictures(
    transformers: Any, folder: Path, family: Family, config: Any, decode: Decode
) -> ProcessedPictures | PatchedPictures:
    """The processor over PIL. config: of the picture tower."""
    usual = family.processor
    settings, _ = getattr(transformers, PROCESSORS[usual][0]).get_image_processor_dict(folder, local_files_only=True)
    written = settings.get("image_processor_type") or settings.get("feature_extractor_type") or usual
    name = written.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    if name not in PROCESSORS:
        raise CheckpointError(
            f"has the processor {written}, expected one of {', '.join(sorted(PROCESSORS))}", at=folder
        )
    over_pil, otherwise = PROCESSORS[name]
    more = {key: value for key, value in otherwise.items() if settings.get(key) is None}
    processor = getattr(transformers, over_pil).from_pretrained(folder, local_files_only=True, **more)
    where = f"{folder}/preprocessor_config.json"
    if name == "Siglip2ImageProcessor":
        if not 1 <= processor.max_num_patches <= MOST_PATCHES:
            raise CheckpointError(
                f"{where}: max_num_patches: expected 1 to {MOST_PATCHES}, got {processor.max_num_patches}"
            )
        if processor.patch_size != config.patch_size:
            raise CheckpointError(
                f"{where}: patch_size: expected {config.patch_size}, as the model has it, got {processor.patch_size}"
            )
        return PatchedPictures(processor, decode, family.num_patches)
    # Before a picture is made: one as large as the file says may not fit into memory.
    side, most = config.image_size, 4 * config.image_size
    for size, switch in (("size", "do_resize"), ("crop_size", "do_center_crop")):
        asked = dict(getattr(processor, size, None) or {}) if getattr(processor, switch, False) else {}
        for one in asked.values():
            if one is not None and not 1 <= one <= most:
                raise CheckpointError(f"{where}: {size}: expected 1 to {most} pixels a side, got {one}")
    pictures = ProcessedPictures(processor, decode)
    if pictures.shape != (3, side, side):
        raise CheckpointError(
            f"preprocessor_config.json makes pixels {pictures.shape}, the model takes {(3, side, side)}", at=folder
        )
    return pictures


def _longest(config: Any, tokenizer: Any, family: Family) -> int:
    """Tokens of the longest text, as tokenizer and position embeddings have them. config: of the text tower."""
    spare = int(config.pad_token_id) + 1 if family.has_spare_positions else 0
    return min(int(tokenizer.model_max_length), int(config.max_position_embeddings) - spare)


def _logit_scale(model: Any) -> float:
    """The factor on cosines, under the name that the family has for it."""
    if hasattr(model, "temperature"):
        return 1 / float(model.temperature.detach())
    return float(model.logit_scale.detach().exp())


def _image_tower(model: Any, pixels_B3RR: Tensor) -> Tensor:
    return _pooled(model.get_image_features(pixel_values=pixels_B3RR.to(model.dtype)))


def _block_tower(model: Any, blocks: Tensor) -> Tensor:
    """Of blocks (B, 1 + N, V), whose first row says how many patches follow."""
    size_B2, pixels_BNV = blocks[:, 0, :2], blocks[:, HEADER:]
    numbers_N = torch.arange(pixels_BNV.shape[1], device=blocks.device)
    mask_BN = (numbers_N[None] < size_B2.prod(dim=1, keepdim=True)).long()
    return _pooled(
        model.get_image_features(
            pixel_values=pixels_BNV.to(model.dtype), pixel_attention_mask=mask_BN, spatial_shapes=size_B2.long()
        )
    )


def _text_tower(model: Any, pad_id: int | None, token_ids_BL: Tensor) -> Tensor:
    """pad_id: of padding that is hidden from attention, if it is."""
    mask = {} if pad_id is None else {"attention_mask": (token_ids_BL != pad_id).long()}
    return _pooled(model.get_text_features(input_ids=token_ids_BL, **mask))


def _pooled(output: Any) -> Tensor:
    features: Tensor = output.pooler_output
    return features


@contextlib.contextmanager
def _explained(transformers: Any, folder: Path) -> Iterator[None]:
    """Turns whatever transformers raises, of no common type, into a sentence that names the folder.

    Without its bars and warnings, which speak of what is checked here.
    """
    logging = transformers.utils.logging
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    step = "download it again, or give another folder"
    with reading(folder, CheckpointError, what="not a folder that transformers can open", step=step):
        try:
            yield
        except CnClipError:
            raise
        except ImportError as error:
            raise MissingExtraError(
                f"{folder}: transformers lacks a package for it ({first_sentence(error)}); "
                f"install it with: {install_command('hf')}"
            ) from error
        except Exception as error:
            for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
                if (known := what_it_is(file)) is not None:
                    raise CheckpointError(known, at=file) from error
            raise
        finally:
            logging.set_verbosity(verbosity)
            if has_bars:
                logging.enable_progress_bar()
