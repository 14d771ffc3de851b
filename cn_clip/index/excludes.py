"""Which names below a folder of pictures are passed over: those that systems and programs make, and those asked for.

Hidden names, such as `.thumbnails` and `.Trash-1000`, are passed over by `data.paths.walked` everywhere.
"""

import re
from collections.abc import Iterable
from fnmatch import translate

from cn_clip.errors import ConfigError

# Of NAS boxes (Synology, QNAP), Windows, archives of macOS, Lightroom, and projects with JavaScript.
ALWAYS = (
    "@eaDir",
    "#recycle",
    "#snapshot",
    "@tmp",
    "@Recycle",
    "@Recently-Snapshot",
    "$RECYCLE.BIN",
    "RECYCLER",
    "System Volume Information",
    "lost+found",
    "__MACOSX",
    "*.lrdata",
    "node_modules",
)


class Excludes:
    """The names of `ALWAYS` and the given patterns, upper and lower case alike.

    globs: `*`, `?` and `[a-z]` stand for letters, `*` for "/" too. A pattern without "/" is that of a name in any
    folder, one with "/" that of a path from the source on. A folder that fits is passed over with all that is in it.
    """

    def __init__(self, globs: Iterable[str] = ()) -> None:
        names, paths = list(ALWAYS), list[str]()
        for glob in globs:
            bare = glob.removeprefix("./").rstrip("/")
            if not bare:
                raise ConfigError(f"--exclude {glob!r}: expected a name or a path, such as '*.gif' or '旅行/草稿'")
            if "/" in bare:
                paths.append(bare.removeprefix("/"))
            else:
                names.append(bare)
        self._names, self._paths = _one_of(names), _one_of(paths)

    def admits(self, path: str, name: str) -> bool:
        """Whether what has this path, relative to the source, and this name is looked at; its folder is."""
        return not (self._names.match(name) or self._paths.match(path))

    def covers(self, path: str) -> bool:
        """Whether a path, relative to the source, or a folder above it is passed over."""
        parts = path.split("/")
        return not all(self.admits("/".join(parts[:end]), parts[end - 1]) for end in range(1, len(parts) + 1))


def _one_of(globs: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(translate, globs)) or r"(?!)", re.IGNORECASE)
