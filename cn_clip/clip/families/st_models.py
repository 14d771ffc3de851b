"""Folders of sentence-transformers that take pictures and texts, run by sentence-transformers itself.

Its prompts are those of the folder's config: texts are asked for as queries, and pictures are what is looked for.
Code that comes with a folder is run only if it was allowed to.
"""

# B batch, N pixels, D embedding

import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cn_clip import ranks
from cn_clip.clip.backends.base import AnyPixels, Facts, Parts, Pixels, Rows, TokenIds, unit_rows
from cn_clip.clip.backends.names import check_threads, settled, torch_precisions
from cn_clip.clip.backends.pytorch import DTYPES
from cn_clip.clip.blocks import HEADER, trimmed, write_block
from cn_clip.clip.families.rgb import RgbPictures
from cn_clip.clip.transforms import Decode
from cn_clip.errors import CheckpointError, CnClipError, MissingExtraError, first_sentence
from cn_clip.extras import install_command, require
from cn_clip.processes import compute_alone_in_children

MODULES = "modules.json"
_OWN = "sentence_transformers."
_LEAST = (5, 4)
# A picture comes to the model in its own proportions with at most so many pixels: larger ones are scaled down to it.
MOST_PIXELS = 1024 * 1024
# Large models, and large pictures.
_BATCH_SIZES = (8, 32)
# A text comes as its characters, which the model's own tokenizer is given: no number of them is too large.
_LONGEST_TEXT = 1 << 16
_NO_CHARACTER = -1


class WholePictures(RgbPictures):
    """Pictures as RGB pixels in their own proportions, in blocks, for the processor of the model."""

    shape = (HEADER + MOST_PIXELS, 3)
    resolution = math.isqrt(MOST_PIXELS)

    def _write(self, image: Image.Image, out: Pixels) -> None:
        if image.width * image.height > MOST_PIXELS:
            scale = math.sqrt(MOST_PIXELS / (image.width * image.height))
            width, height = (max(1, min(MOST_PIXELS, int(side * scale))) for side in image.size)
            image = image.resize((width, max(1, min(height, MOST_PIXELS // width))), Image.Resampling.BICUBIC)
        write_block(np.asarray(image, np.float32).reshape(-1, 3), (image.height, image.width), out)


def pictures_of(blocks: Pixels) -> list[Image.Image]:
    """The pictures of blocks (B, 1 + N, 3), as they were written."""
    found = []
    for block in blocks:
        height, width = (int(size) for size in block[0, :2])
        pixels = block[HEADER : HEADER + height * width].astype(np.uint8)
        found.append(Image.fromarray(pixels.reshape(height, width, 3)))
    return found


class WholeTexts:
    """Texts as the numbers of their characters: a model of sentence-transformers has prompts and tokens of its own."""

    context_length = _LONGEST_TEXT

    def rows(self, texts: Sequence[str]) -> list[list[int]]:
        """The numbers of the characters of each text."""
        return [[*map(ord, text[:_LONGEST_TEXT])] for text in texts]

    def pad(self, rows: Sequence[Sequence[int]]) -> TokenIds:
        """Rows of different lengths as one int64 array (B, L)."""
        length = max(map(len, rows), default=0)
        filled = [[*row, *[_NO_CHARACTER] * (length - len(row))] for row in rows]
        return np.array(filled, dtype=np.int64).reshape(len(rows), length)


def texts_of(token_ids_BL: TokenIds) -> list[str]:
    """The texts of what `WholeTexts` made."""
    return ["".join(chr(one) for one in row if one != _NO_CHARACTER) for row in token_ids_BL.tolist()]


class SentenceTowers:
    """A model of sentence-transformers as a backend of PyTorch."""

    def __init__(self, model: Any, *, device: torch.device, precision: str, num_threads: int | None) -> None:
        compute_alone_in_children()
        check_threads(num_threads)
        ranks.use_threads(num_threads)
        self.precision = settled("torch", precision, torch_precisions(device))
        self.model = model.to(device=device, dtype=DTYPES[self.precision]).eval()
        self.resolution = WholePictures.resolution
        self.facts = Facts(
            backend="torch",
            precision=self.precision,
            device=str(device),
            batch_sizes=_BATCH_SIZES,
            num_parameters=(sum(one.numel() for one in model.parameters()), 0),
        )
        self.embed_dim = self._rows(model.encode_query, ["一"]).shape[1]

    def encode_pixels(self, pixels: AnyPixels) -> Rows:
        """Blocks of pixels, float32 (B, 1 + N, 3), to unit rows (B, D), float32."""
        return self._rows(self.model.encode_document, pictures_of(trimmed(pixels)))

    def encode_tokens(self, token_ids_BL: TokenIds) -> Rows:
        """Texts as the numbers of their characters, int64 (B, L), to unit rows (B, D), float32."""
        return self._rows(self.model.encode_query, texts_of(token_ids_BL))

    def _rows(self, encode: Callable[..., Any], inputs: list[Any]) -> Rows:
        rows = encode(inputs, batch_size=len(inputs), convert_to_tensor=True, show_progress_bar=False)
        return unit_rows(rows.float().cpu().numpy())


def open_folder(
    folder: Path,
    *,
    device: torch.device,
    precision: str = "fp32",
    num_threads: int | None = None,
    decode: Decode = "exact",
    trust_remote_code: bool = False,
) -> Parts:
    """The model of a folder of sentence-transformers.

    Raises CheckpointError for what it cannot open, a model that takes no pictures, or, unless `trust_remote_code`, one
    that wants code of its own; MissingExtraError without sentence-transformers.
    """
    if not trust_remote_code:
        _check_modules(folder)
    library: Any = require("sentence_transformers", extra="st", purpose=f"st:{folder}")
    version = library.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < _LEAST:
        raise MissingExtraError(
            f"st:{folder}: needs sentence-transformers 5.4, {version} is installed; install it with: "
            f"{install_command('st')}"
        )
    try:
        model = library.SentenceTransformer(
            str(folder), device=str(device), trust_remote_code=trust_remote_code, local_files_only=True
        )
        if not {"text", "image"} <= set(model.modalities):
            raise CheckpointError(f"takes {', '.join(map(str, model.modalities))}, expected text and image", at=folder)
        towers = SentenceTowers(model, device=device, precision=precision, num_threads=num_threads)
    except CnClipError:
        raise
    except ImportError as error:
        raise MissingExtraError(
            f"{folder}: sentence-transformers lacks a package for it ({first_sentence(error)}); "
            f"install it with: {install_command('st')}"
        ) from error
    except Exception as error:  # of no common type
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise _wants_code(folder) from error
        raise CheckpointError(
            f"sentence-transformers cannot open it ({first_sentence(error)}); download it again, or give another",
            at=folder,
        ) from error
    _tell_prompts(model, folder)
    return Parts(towers, WholePictures(decode), WholeTexts())


def _wants_code(folder: Path) -> CheckpointError:
    return CheckpointError(
        "asks for code of its own, which is not run; read that code, and if you trust it, give --trust-remote-code "
        "(trust_remote_code=True)",
        at=folder,
    )


def _check_modules(folder: Path) -> None:
    """Raises CheckpointError for a folder with modules of its own."""
    try:
        modules = json.loads((folder / MODULES).read_text(encoding="utf-8"))
        kinds = [str(module["type"]) for module in modules]
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{MODULES} cannot be read ({first_sentence(error)})", at=folder) from error
    if any(not kind.startswith(_OWN) for kind in kinds):
        raise _wants_code(folder)


def _tell_prompts(model: Any, folder: Path) -> None:
    """Says once what is put before texts and pictures."""
    prompts = {name: text for name, text in (model.prompts or {}).items() if text}
    used = [f"{name} {prompts[name]!r}" for name in ("query", "document") if name in prompts]
    if used:
        logging.getLogger(__name__).warning("%s: prompts of its config: %s", folder, ", ".join(used))
