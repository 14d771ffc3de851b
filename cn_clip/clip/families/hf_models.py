"""Models of transformers: CLIP, SigLIP, AltCLIP, MetaCLIP 2 and Chinese-CLIP folders, run by transformers itself.

Pictures go through the processor of the folder and texts through its tokenizer: nothing of them is repeated here.
Code that comes with a folder is never run, and pickled weights are read only by `torch.load(weights_only=True)`.
"""

# B batch, R resolution, L tokens, D embedding

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cn_clip.clip.backends.base import Parts, Pixels, TokenIds
from cn_clip.clip.backends.pytorch import ForeignTowers
from cn_clip.clip.transforms import Decode, draft_side, in_8_bits
from cn_clip.clip.weights.file_kinds import what_it_is
from cn_clip.clip.weights.hf import CONFIG_FILE, read_json
from cn_clip.errors import CheckpointError, CnClipError, MissingExtraError, first_sentence, reading
from cn_clip.extras import install_command, require

_VISUAL_PARTS = ("vision_model.", "visual_projection.")


@dataclass(frozen=True)
class Family:
    """How the texts of a family were padded when it was trained.

    is_masked: padding is hidden from attention; if it is not, attention is causal, or the tower was trained with it.
    is_full: every text is padded to the longest that the tower takes. is_lower_cased: the tower never saw upper case,
    whether or not the folder's tokenizer sees to that: those of SigLIP 2 do not (arXiv 2502.14786).
    has_spare_positions: as in RoBERTa, the first position embeddings, one more than the id of padding, belong to no
    text. processor: of pictures, if the folder does not name one.
    """

    is_masked: bool = False
    is_full: bool = False
    is_lower_cased: bool = False
    has_spare_positions: bool = False
    processor: str = "CLIPImageProcessor"


# By the `model_type` of config.json.
FAMILIES = {
    "clip": Family(),
    "siglip": Family(is_full=True, is_lower_cased=True, processor="SiglipImageProcessor"),
    "altclip": Family(is_masked=True, has_spare_positions=True),
    "metaclip_2": Family(),
    "chinese_clip": Family(is_masked=True, processor="ChineseCLIPImageProcessor"),
}
PROCESSORS = {family.processor for family in FAMILIES.values()}


class ProcessedPictures:
    """A folder's image processor as a `PictureTransform`."""

    def __init__(self, processor: Any, decode: Decode) -> None:
        self._processor, self.decode = processor, decode
        self.shape: tuple[int, ...] = self._pixels(Image.new("RGB", (3, 2))).shape

    @property
    def resolution(self) -> int:
        """The side of a picture in pixels."""
        return self.shape[-1]

    @property
    def draft_size(self) -> int | None:
        """The side that must remain when a JPEG is decoded at a fraction of its size; None: decoded whole."""
        size = getattr(self._processor, "size", None) or {}
        return draft_side(self.decode, int(size.get("shortest_edge") or self.resolution))

    def array(self, image: Image.Image, out: Pixels | None = None) -> Pixels:
        """Normalised pixels, float32 (3, R, R), in `out` if it is given."""
        image = in_8_bits(image, self.decode)
        pixels_3RR = self._pixels(image if image.mode == "RGB" else image.convert("RGB"))
        if out is None:
            return pixels_3RR
        out[...] = pixels_3RR
        return out

    def __call__(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(self.array(image))

    def _pixels(self, image: Image.Image) -> Pixels:
        batch = self._processor(images=[image], return_tensors="np")
        pixels: Pixels = np.ascontiguousarray(batch["pixel_values"][0], dtype=np.float32)
        return pixels


class TokenizedTexts:
    """A folder's tokenizer as a `TextTransform`."""

    def __init__(self, tokenizer: Any, *, context_length: int, is_full: bool, is_lower_cased: bool = False) -> None:
        self._tokenizer, self.context_length, self.is_full = tokenizer, context_length, is_full
        self.is_lower_cased = is_lower_cased
        self.pad_id = int(tokenizer.pad_token_id or 0)

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


def open_folder(
    folder: Path,
    *,
    device: torch.device,
    precision: str = "fp32",
    num_threads: int | None = None,
    decode: Decode = "exact",
) -> Parts:
    """The model of a transformers folder with its processor and tokenizer.

    Raises CheckpointError for a folder of another family, one that does not fit its config.json, lacks weights or asks
    for code of its own; MissingExtraError without transformers.
    """
    config = read_json(folder / CONFIG_FILE)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        more = ", and code that comes with a folder is not run" if "auto_map" in config else ""
        raise CheckpointError(
            f"is of the family {kind!r}, expected one of {', '.join(sorted(FAMILIES))}{more}", at=folder
        )
    family = FAMILIES[kind]
    transformers: Any = require("transformers", extra="hf", purpose=f"hf:{folder}")
    version = transformers.__version__
    if int(version.split(".")[0]) < 5:  # 4.57 fails on the texts of a ChineseCLIPModel, and has other processors
        raise MissingExtraError(
            f"hf:{folder}: needs transformers 5, {version} is installed; install it with: {install_command('hf')}"
        )
    if (folder / "spiece.model").is_file():
        # Without it transformers 5 takes another tokenizer of the folder, which leaves out what SigLIP does to a text.
        require("sentencepiece", extra="hf", purpose=f"hf:{folder}")
    with _explained(transformers, folder):
        model = _load_model(transformers, folder)
        pictures = _open_pictures(transformers, folder, family.processor, model.config.vision_config, decode)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        longest = _longest(model, tokenizer, family)
        texts = TokenizedTexts(
            tokenizer, context_length=longest, is_full=family.is_full, is_lower_cased=family.is_lower_cased
        )
        towers = ForeignTowers(
            model,
            encode_image=lambda pixels_B3RR: _pooled(model.get_image_features(pixel_values=pixels_B3RR)),
            encode_text=_text_tower(model, family, texts.pad_id),
            resolution=pictures.resolution,
            logit_scale=float(model.logit_scale.detach().exp()),
            visual_parts=_VISUAL_PARTS,
            device=device,
            precision=precision,
            num_threads=num_threads,
        )
        towers.encode_tokens(texts.pad(texts.rows(["一"])))  # what fails with every text fails here
    return Parts(towers, pictures, texts)


def _load_model(transformers: Any, folder: Path) -> Any:
    model, found = transformers.AutoModel.from_pretrained(
        folder,
        local_files_only=True,
        trust_remote_code=False,
        weights_only=True,
        use_safetensors=True if any(folder.glob("*.safetensors")) else None,
        dtype=torch.float32,
        output_loading_info=True,
    )
    # transformers would go on, with random values instead of them.
    for what in ("missing_keys", "mismatched_keys"):
        if wrong := sorted(map(str, found.get(what) or ())):
            listed = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
            raise CheckpointError(f"the weights do not fit config.json: {what.replace('_', ' ')} {listed}", at=folder)
    return model


def _open_pictures(transformers: Any, folder: Path, usual: str, config: Any, decode: Decode) -> ProcessedPictures:
    """The processor over PIL: those over torchvision, which AutoImageProcessor needs, resize a little differently.

    usual: the processor of a folder that does not name one. config: of the picture tower.
    """
    settings, _ = getattr(transformers, f"{usual}Pil").get_image_processor_dict(folder, local_files_only=True)
    written = settings.get("image_processor_type") or settings.get("feature_extractor_type") or usual
    name = written.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    if name not in PROCESSORS:
        raise CheckpointError(
            f"has the processor {written}, expected one of {', '.join(sorted(PROCESSORS))}", at=folder
        )
    processor = getattr(transformers, f"{name}Pil").from_pretrained(folder, local_files_only=True)
    # Before a picture is made: one as large as the file says may not fit into memory.
    side, most = config.image_size, 4 * config.image_size
    for size, switch in (("size", "do_resize"), ("crop_size", "do_center_crop")):
        asked = dict(getattr(processor, size, None) or {}) if getattr(processor, switch, False) else {}
        for one in asked.values():
            if one is not None and not 1 <= one <= most:
                raise CheckpointError(
                    f"{folder}/preprocessor_config.json: {size}: expected 1 to {most} pixels a side, got {one}"
                )
    pictures = ProcessedPictures(processor, decode)
    if pictures.shape != (3, side, side):
        raise CheckpointError(
            f"preprocessor_config.json makes pixels {pictures.shape}, the model takes {(3, side, side)}", at=folder
        )
    return pictures


def _longest(model: Any, tokenizer: Any, family: Family) -> int:
    """Tokens of the longest text, as tokenizer and position embeddings have them."""
    config = model.config.text_config
    spare = int(config.pad_token_id) + 1 if family.has_spare_positions else 0
    return min(int(tokenizer.model_max_length), int(config.max_position_embeddings) - spare)


def _text_tower(model: Any, family: Family, pad_id: int) -> Callable[[Tensor], Tensor]:
    def encode(token_ids_BL: Tensor) -> Tensor:
        mask = {"attention_mask": (token_ids_BL != pad_id).long()} if family.is_masked else {}
        return _pooled(model.get_text_features(input_ids=token_ids_BL, **mask))

    return encode


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
