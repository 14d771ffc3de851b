"""Files of the ELEVATER benchmark."""

import json
from pathlib import Path

from cn_clip.clip.backends.base import Rows
from cn_clip.clip.families.names import is_foreign
from cn_clip.errors import DataError
from cn_clip.files import atomic_write
from cn_clip.jsonl import dumps


def read_index(path: Path, num_pictures: int) -> list[int]:
    """ELEVATER's order of the pictures; raises DataError for anything but a JSON list of all numbers, each once."""
    try:
        order = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read ({error}); expected a JSON list of picture numbers", at=path) from error
    if not isinstance(order, list):
        raise DataError(f"holds a {type(order).__name__}; expected a JSON list of picture numbers", at=path)
    for number in order:
        if type(number) is not int or not 0 <= number < num_pictures:
            raise DataError(f"expected picture numbers from 0 to {num_pictures - 1}, got {number!r}", at=path)
    if len(order) != num_pictures or len(set(order)) != num_pictures:
        raise DataError(
            f"expected each of the numbers of {num_pictures} pictures once, got {len(order)} numbers, "
            f"{len(set(order))} different ones; is it the index of this dataset?",
            at=path,
        )
    return order


def write(
    path: Path,
    probabilities_NC: Rows,
    model: str,
    vision_model: str | None,
    *,
    dataset: str,
    num_parameters: tuple[int, int],
) -> None:
    """Writes the predictions of a dataset for ELEVATER's site: probabilities (1, N, C) to 6 decimals, and facts.

    model, vision_model: what was opened, and its picture tower where that was named. num_parameters: of the model, and
    of its picture tower. Raises DataError when the file cannot be written; its folder exists.
    """
    total, visual = num_parameters
    rounded = [[round(value, 6) for value in row] for row in probabilities_NC.tolist()]
    content = {
        "model_name": model if is_foreign(model) else f"CN-CLIP-{vision_model or Path(model).stem}",
        "dataset_name": dataset,
        "num_trainable_params": 0,
        "num_params": total,
        "num_visual_params": visual,
        "num_backbone_params": total,
        "n_shot": 0,
        "rnd_seeds": [123],
        "predictions": [rounded],
    }
    with atomic_write(path) as stream:
        stream.write(dumps(content))
