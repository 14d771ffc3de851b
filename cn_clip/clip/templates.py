"""Prompt templates for zero-shot classification, the package's own as data, and files of the user; lists of labels."""

import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from cn_clip.errors import DataError, Where
from cn_clip.jsonl import numbered_lines, text_of

SLOT = "{}"
FOLDER = Path(__file__).parent / "prompt_templates"
DEFAULT = "default"
# Datasets whose pictures are no everyday photos; all but the last are named as Chinese-CLIP's zero-shot data are.
THEMED = (
    "fgvc-aircraft-2013b-variants102",
    "food-101",
    "oxford-flower-102",
    "eurosat_clip",
    "resisc45_clip",
    "country211",
    "emoji",
)


def load_templates(dataset: str, file: Path | None = None) -> list[str]:
    """The templates of `file` when given, else those written for `dataset`, else the general ones; at least one.

    `file` is a JSON list (suffix .json) or text, one template a line, UTF-8.
    Raises DataError, with file and line (or item), for a template that does not hold exactly one `{}`.
    """
    return list(_checked(file)) if file else list(_embedded(dataset if dataset in THEMED else DEFAULT))


def fill(template: str, label: str) -> str:
    """The template with `label` instead of `{}`; nothing else in either has a meaning."""
    return template.replace(SLOT, label)


@cache
def _embedded(name: str) -> tuple[str, ...]:
    return tuple(_checked(FOLDER / f"{name}.json"))


def _checked(file: Path) -> Iterator[str]:
    """Yields the templates of a file once each has been found to hold one slot."""
    found: list[tuple[Where, Any]]
    if file.suffix.lower() == ".json":
        try:
            items = json.loads(file.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise DataError(f"cannot be opened ({error.strerror})", at=file) from error
        except json.JSONDecodeError as error:
            where = Where(file, line=error.lineno)
            raise DataError(f"not valid JSON ({error.msg}); expected a list of strings", at=where) from error
        except UnicodeDecodeError as error:
            raise DataError(f"invalid UTF-8 at byte {error.start}; save the file as UTF-8", at=file) from error
        if not isinstance(items, list):
            raise DataError(f"expected a JSON list of strings, got {type(items).__name__}", at=file)
        found = [(Where(file, part=f"item {number}"), item) for number, item in enumerate(items, start=1)]
    else:
        lines = ((Where(file, line=number), line) for number, line in numbered_lines(file))
        found = [(where, text_of(line, where)) for where, line in lines]
    if not found:
        raise DataError(f"holds no template; expected lines such as `一张{SLOT}的照片`", at=file)
    for where, template in found:
        _check(template, where)
    return (template for _, template in found)


def checked(templates: Sequence[str]) -> list[str]:
    """Templates that are no file's, as a list; raises DataError for none, and for one without exactly one `{}`."""
    if not templates:
        raise DataError(f"templates: expected at least one, such as '一张{SLOT}的照片'")
    for number, template in enumerate(templates):
        _check(template, f"templates[{number}]")
    return list(templates)


def _check(template: object, where: object) -> None:
    if not isinstance(template, str):
        raise DataError(f"expected a string, got {type(template).__name__}", at=where)
    if template.count(SLOT) != 1:
        raise DataError(f"expected exactly one {SLOT} for the label, got {template!r}", at=where)


def read_labels(path: Path) -> list[str]:
    """The labels, one a line; raises DataError for an empty line or a file that cannot be read."""
    labels = [text_of(line, Where(path, line=number)) for number, line in numbered_lines(path, with_blank=True)]
    while labels and not labels[-1]:
        labels.pop()
    if not labels:
        raise DataError("no labels in it; expected one a line", at=path)
    if "" in labels:
        number = labels.index("") + 1
        raise DataError(
            "an empty line; expected one label a line, in the order of the folders", at=Where(path, line=number)
        )
    return labels
