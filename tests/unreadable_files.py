"""Files that the system refuses to read, for tests: whoever runs them may be root, whom no mode keeps out."""

import builtins
import contextlib
import io
import os
import pathlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@contextlib.contextmanager
def unreadable(number: int, *paths: Path, stat: bool = False) -> Iterator[None]:
    """These paths, and what is below them, answer with an error number when they are opened or listed.

    stat: also when they are asked for their size, as of a share that went away.
    """
    wanted = [os.path.abspath(path) for path in paths]

    def guarded(real: Callable[..., Any]) -> Callable[..., Any]:
        def ask(path: Any = ".", *args: Any, **options: Any) -> Any:
            if isinstance(path, (str, bytes, os.PathLike)):
                place = os.path.abspath(os.fsdecode(path))
                if any(place == one or place.startswith(one + os.sep) for one in wanted):
                    raise OSError(number, os.strerror(number), os.fsdecode(path))
            return real(path, *args, **options)

        return ask

    with pytest.MonkeyPatch.context() as patch:
        opened = guarded(builtins.open)
        patch.setattr(builtins, "open", opened)
        patch.setattr(io, "open", opened)
        for name in ("open", "scandir", "listdir", *(["stat"] if stat else [])):
            patch.setattr(os, name, guarded(getattr(os, name)))
        if (accessor := getattr(pathlib, "_NormalAccessor", None)) is not None:  # Python 3.10 has functions of its own
            patch.setattr(accessor, "open", staticmethod(opened))
            for name in ("scandir", "listdir", *(["stat"] if stat else [])):
                patch.setattr(accessor, name, staticmethod(guarded(getattr(accessor, name))))
        yield
