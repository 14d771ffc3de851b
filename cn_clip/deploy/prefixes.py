"""Prefixes that the deployment commands write at: checked before hours of work, not after."""

import os
from collections.abc import Iterable
from pathlib import Path

from cn_clip.errors import ConfigError

EXAMPLE = "vit-b-16"


def check_targets(flag: str, prefix: str | Path, targets: Iterable[Path], *, are_folders: bool = False) -> None:
    """Raises ConfigError, naming the flag, when files (or folders) with that prefix cannot be written there.

    Makes nothing: a folder that is not there yet is good where it can be made.
    """
    given = os.fspath(prefix)
    if not given:
        raise ConfigError(f"{flag}: expected a prefix such as out/{EXAMPLE}, got ''")
    if given.endswith(("/", os.sep)):
        raise ConfigError(f"{flag} {given}: ends like a folder; give a prefix in it, such as {Path(given, EXAMPLE)}")
    if Path(given).is_dir():
        raise ConfigError(f"{flag} {given}: is a folder; give a prefix in it, such as {Path(given, EXAMPLE)}")
    above = next(folder for folder in Path(given).absolute().parents if os.path.lexists(folder))
    reason = None if above.is_dir() else "Not a directory"
    if reason is None and not os.access(above, os.W_OK | os.X_OK):
        reason = "Permission denied"
    if reason:
        raise ConfigError(f"{flag} {given}: cannot be written ({reason}); choose another folder")
    for target in targets:
        if target.exists() and target.is_dir() != are_folders:
            kind = "a folder" if target.is_dir() else "a file"
            raise ConfigError(f"{flag} {given}: {target} is {kind}; choose another prefix")
