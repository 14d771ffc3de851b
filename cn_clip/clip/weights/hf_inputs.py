"""How a transformers folder prepares pictures and texts: as this package does, or it is refused."""

import logging
import math
import os
from pathlib import Path
from typing import Any

from cn_clip.clip.tokenizer import VOCAB_FILE
from cn_clip.clip.transforms import MEAN, STD
from cn_clip.clip.weights.hf import read_json
from cn_clip.errors import CheckpointError, reading

logger = logging.getLogger(__name__)

PICTURE_FILE = "preprocessor_config.json"
BICUBIC = 3  # as PIL numbers it


def picture_fields(resolution: int) -> dict[str, Any]:
    """What `clip.transforms` does to pictures, in transformers' terms: squeezed, not cropped."""
    size = {"height": resolution, "width": resolution}
    return {
        "do_resize": True,
        "size": size,
        "resample": BICUBIC,
        "do_center_crop": False,
        "crop_size": size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
    }


def check_inputs(folder: Path, resolution: int) -> None:
    """Raises CheckpointError where files of the folder ask for other pixels or other words than this package makes.

    A folder without such files says nothing. One that keeps the proportions of pictures, as transformers does where
    nobody told it how Chinese-CLIP was trained, is warned about.
    """
    for path, fields in _picture_settings(folder):
        _check_pictures(path, fields, resolution)
    for path, words in _vocabularies(folder):
        if words != _words(VOCAB_FILE.read_text(encoding="utf-8")):
            raise CheckpointError(f"is another vocabulary than that of Chinese-CLIP; {_instead(folder)}", at=path)


def _check_pictures(path: Path, fields: dict[str, Any], resolution: int) -> None:
    expected = picture_fields(resolution)
    is_squeezed = fields.get("size") not in (resolution, {"shortest_edge": resolution})
    ignored = ["do_center_crop", *([] if fields.get("do_center_crop") else ["crop_size"])]
    ignored += [] if is_squeezed else ["size"]
    for name, wanted in expected.items():
        if name in fields and name not in ignored and not _is_same(fields[name], wanted):
            shown = repr(fields[name])[:60]
            raise CheckpointError(f"{name} is {shown}, expected {wanted}; {_instead(path.parent)}", at=path)
    if not is_squeezed:
        logger.warning(
            "%s: keeps the proportions of pictures; here they are squeezed, as Chinese-CLIP was trained; for the "
            "other, use hf:%s",
            path,
            path.parent,
        )


def _instead(folder: Path) -> str:
    return f"to have pictures and texts prepared as the folder says, use hf:{folder} (cn-clip features, serve, …)"


def _is_same(given: object, expected: object) -> bool:
    if isinstance(expected, dict) and isinstance(given, int):  # one number means a square
        return {given} == set(expected.values())
    if isinstance(expected, (list, tuple)):
        return isinstance(given, list) and len(given) == len(expected) and all(map(_is_same, given, expected))
    if isinstance(expected, float):
        return isinstance(given, (int, float)) and math.isclose(given, expected, abs_tol=1e-5)
    return given == expected


def _picture_settings(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Of every file that has any: transformers 5 writes them into one of its processor's own."""
    found = []
    for name in (PICTURE_FILE, "processor_config.json"):
        if os.path.isfile(folder / name):
            content = read_json(folder / name)
            fields = content if name == PICTURE_FILE else content.get("image_processor")
            found += [(folder / name, fields)] if isinstance(fields, dict) else []
    return found


def _vocabularies(folder: Path) -> list[tuple[Path, list[str]]]:
    found = []
    if os.path.isfile(path := folder / "vocab.txt"):
        with reading(path, CheckpointError, what="not a vocabulary that can be read", step=_instead(folder)):
            found.append((path, _words(path.read_text(encoding="utf-8"))))
    if os.path.isfile(path := folder / "tokenizer.json"):
        model = read_json(path).get("model")
        vocab = model.get("vocab") if isinstance(model, dict) else None
        if not isinstance(vocab, dict) or not all(type(number) is int for number in vocab.values()):
            raise CheckpointError(f"holds no vocabulary of words; {_instead(folder)}", at=path)
        found.append((path, [word.strip() for word in sorted(vocab, key=vocab.__getitem__)]))
    return found


def _words(text: str) -> list[str]:
    return [line.strip() for line in text.rstrip("\n").split("\n")]
