"""The commands that the demo's page gives to go on with, as they are typed on this machine."""

import importlib.util
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from cn_clip import extras

MODEL = "ViT-B-16"
QUERY = "海边的日落"
INDEX = "photos.index"
_PLAIN = re.compile(r"[\w@%+=:,./\\-]+", re.ASCII)
_XDG = re.compile(r'^XDG_PICTURES_DIR="(.+)"$', re.MULTILINE)


def typed(words: Sequence[object], *, on_windows: bool | None = None) -> str:
    """A command for the shell of this machine: sh, or PowerShell on Windows."""
    texts = list(map(str, words))
    if not (sys.platform == "win32" if on_windows is None else on_windows):
        return shlex.join(texts)
    quoted = [text if _PLAIN.fullmatch(text) else "'" + text.replace("'", "''") + "'" for text in texts]
    return " ".join(["&", *quoted] if quoted[0] != texts[0] else quoted)


def program() -> list[str]:
    """How cn-clip is started: by its name if that is the one of this Python, else by this Python."""
    found = shutil.which("cn-clip")
    is_own = found is not None and Path(found).parent == Path(sys.executable).parent
    return ["cn-clip"] if is_own else [sys.executable, "-m", "cn_clip"]


def pictures_folder(home: Path | None = None) -> Path:
    """Where this machine's user keeps pictures; the usual folder if there is none."""
    home = home or Path.home()
    try:
        settings = (home / ".config" / "user-dirs.dirs").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        settings = ""
    named = [Path(found.replace("$HOME", str(home))) for found in _XDG.findall(settings)]
    cloud = os.environ.get("ONEDRIVE")  # of Windows, which moves the folder into it
    in_cloud = [Path(cloud) / "Pictures"] if cloud else []
    usual = home / "Pictures"
    return next((folder for folder in (*named, *in_cloud, usual) if folder.is_dir() and folder != home), usual)


def own_folder() -> list[str]:
    """Three commands that make the pictures of the reader searchable: index, search, and the page in a browser.

    The last one brings what it needs with it where that is not installed.
    """
    cn_clip, folder = program(), pictures_folder()
    serve = typed([*cn_clip, "serve", INDEX, "--originals"])
    if importlib.util.find_spec("fastapi") is None:
        serve = f"{typed([sys.executable, '-m', 'pip', 'install', f'{extras.DISTRIBUTION}[page]'])}\n{serve}"
    return [
        typed([*cn_clip, "index", "build", folder, "--output", INDEX, "--model", MODEL]),
        typed([*cn_clip, "search", INDEX, QUERY]),
        serve,
    ]


def drawings(pictures: Path, index: Path, model: Path | str, query: str) -> list[str]:
    """Two commands that search the drawings of the demo by its model: nothing has to be downloaded for them."""
    cn_clip = program()
    return [
        typed([*cn_clip, "index", "build", pictures.resolve(), "--output", index.resolve(), "--model", model]),
        typed([*cn_clip, "search", index.resolve(), query]),
    ]


def opener(path: Path) -> str:
    """The command that opens a page in the browser."""
    if sys.platform == "win32":
        return typed(["start", path])
    return typed(["open" if sys.platform == "darwin" else "xdg-open", path])
