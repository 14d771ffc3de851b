"""The kinds of feature files by name, and how a path tells which is meant; imports little, for --help."""

from pathlib import Path
from typing import Literal, TypeAlias, get_args

from cn_clip.errors import ConfigError

OutputFormat: TypeAlias = Literal["jsonl", "npz", "parquet"]
FORMATS: tuple[OutputFormat, ...] = get_args(OutputFormat)


def format_of(path: str | None, wanted: OutputFormat | None) -> OutputFormat:
    """The format of an output file: what is wanted, else what the suffix says, else jsonl.

    Raises ConfigError when the suffix is that of another format than the wanted one.
    """
    suffix = Path(path or "").suffix.lower()
    named = next((one for one in FORMATS if suffix == f".{one}"), None)
    if wanted and named and wanted != named:
        raise ConfigError(f"--output-format {wanted}: the suffix of {path} says {named}; change one of them")
    return wanted or named or "jsonl"
