"""How the commands walk a folder of pictures: links followed, each folder once, hidden names left out, in order."""

import os
from collections.abc import Callable, Iterator


def walked(
    root: str | os.PathLike[str], on_error: Callable[[OSError], object]
) -> Iterator[tuple[str, list[str], list[str]]]:
    """(folder, names of folders in it, names of files in it) of `root` and of all below it, names in order.

    A caller that empties the names of folders enters none of them. on_error: told of a folder that cannot be listed,
    with its name in the error; it may raise.
    """
    seen = set[tuple[int, int]]()
    for folder, folders, names in os.walk(root, onerror=on_error, followlinks=True):
        try:
            facts = os.stat(folder)
        except OSError as error:  # removed meanwhile
            folders.clear()
            on_error(error)
            continue
        if (facts.st_dev, facts.st_ino) in seen:
            folders.clear()
            continue
        seen.add((facts.st_dev, facts.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield folder, folders, sorted(name for name in names if not name.startswith("."))
