"""The forms of a model by name, and whether there is room for one; imports nothing heavy."""

import os
import re
from itertools import islice
from pathlib import Path
from typing import Literal

from cn_clip import files
from cn_clip.errors import DataError

Kind = Literal["transformers", "safetensors", "pt", "sentence-transformers", "immich", "transformers-js"]
# Of vectors; the others are of a model.
VectorKind = Literal["clip-retrieval"]
# Of the folders, those that hold ONNX files in place of weights.
ONNX_FOLDERS = ("immich", "transformers-js")
FOLDERS = ("transformers", "sentence-transformers", *ONNX_FOLDERS, "clip-retrieval")
SUFFIXES: dict[str, Kind] = {".pt": "pt", ".pth": "pt", ".safetensors": "safetensors"}
# What a folder of any form holds, folders too; one that holds more is never replaced.
FOLDER_FILES = frozenset(
    {
        *("model.safetensors", "config.json", "preprocessor_config.json"),
        *("vocab.txt", "tokenizer.json", "tokenizer_config.json"),
        *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"),
        *("1_Normalize", "1_Normalize/config.json"),
        *("textual", "textual/tokenizer.json", "textual/tokenizer_config.json", "visual", "visual/preprocess_cfg.json"),
        *(f"{tower}/model.onnx{extra}" for tower in ("textual", "visual") for extra in ("", ".extra_file")),
        "onnx",
        *(
            f"onnx/{name}{form}.onnx"
            for name in ("model", "text_model", "vision_model")
            for form in ("", "_fp16", "_quantized")
        ),
    }
)
# The page of a model; one with this line was written here, another is somebody's work.
CARD_FILE, CARD_MARK = "README.md", "written by cn-clip"
# And the numbered files of vectors.
_NUMBERED = re.compile(r"(img_emb|text_emb|metadata)(/\1_\d+\.(npy|parquet))?")


def require_room(target: Path, kind: Kind | VectorKind, *, overwrite: bool, otherwise: str) -> None:
    """Raises DataError for what only `overwrite` replaces, and for what may never be replaced.

    otherwise: what to do about the former.
    """
    if kind not in FOLDERS:
        files.replaceable(target)
    elif os.path.isdir(target):
        inside = (path.relative_to(target).as_posix() for path in target.rglob("*"))
        others = sorted(islice((name for name in inside if not (is_own(name) or _is_card(target / name))), 3))
        if others:
            raise DataError(f"holds other things ({', '.join(others)}); choose a new folder", at=target)
    elif os.path.exists(target):
        raise DataError("is a file; expected the name of a folder", at=target)
    if not overwrite and (any(target.iterdir()) if os.path.isdir(target) else os.path.exists(target)):
        raise DataError(f"exists; {otherwise}", at=target)


def _is_card(path: Path) -> bool:
    try:
        return path.name == CARD_FILE and CARD_MARK in path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def is_own(name: str) -> bool:
    """Whether a folder of one of the forms may hold a file or folder of that name."""
    return name in FOLDER_FILES or bool(_NUMBERED.fullmatch(name))
