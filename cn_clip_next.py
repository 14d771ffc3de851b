"""The command `cn-clip` when installed: runs `cn_clip.cli`, if the folder `cn_clip` holds the files of this package.

`cn_clip` 1.x of the registry, the original of Chinese-CLIP, has the same import folder. If both are installed, the last
one has overwritten files of the other; beside an editable installation, Python finds the original only. This module is
outside the folder, so it runs in each of these cases and says what to do. It imports nothing of the folder before.
"""

import importlib.util
import os
import sys
from pathlib import Path
from typing import NamedTuple

REMEDY = "pip uninstall -y cn_clip && pip install --force-reinstall --no-deps cn-clip-next"


class Found(NamedTuple):
    """What `import cn_clip` opens: a folder, whether its files are ours, and the version of the original beside it."""

    folder: Path | None
    is_ours: bool
    original: str | None


def look(folder: Path | None) -> Found:
    """What the folder `cn_clip` at this path is; None if Python finds no such package."""
    if folder is None:
        return Found(None, False, None)
    start = folder / "__init__.py"
    is_ours = (folder / "cli.py").is_file() and start.is_file() and b"__version__" in start.read_bytes()
    # One listing of the folder of packages; importlib.metadata would take ten times as long, on every start.
    beside = sorted(folder.parent.glob("cn_clip-[01].*-info"))
    return Found(folder, is_ours, beside[0].name.split("-")[1].removesuffix(".dist") if beside else None)


def problem(found: Found) -> str | None:
    """One line on it in the language of the reader; None if all is well. If the files are not ours, nothing can run."""
    clone = _both("在克隆的仓库里：pip install -e .", "in a clone: pip install -e .")
    if found.is_ours and found.original is None:
        return None
    if found.original is None:
        return f"{found.folder or 'cn_clip'}: " + _both(
            f"cn-clip-next 的文件不全，可能随 cn_clip 一起被卸载了；请运行：{REMEDY}（{clone}）",
            f"files of cn-clip-next are missing, perhaps removed with the package cn_clip; run: {REMEDY} ({clone})",
        )
    effect = (
        _both("它的文件已被 cn-clip-next 覆盖，卸载它会把这些文件一起删掉", "cn-clip-next has overwritten its files")
        if found.is_ours
        else _both("import cn_clip 导入的是它", "`import cn_clip` imports it instead of cn-clip-next")
    )
    return f"{found.folder}: " + _both(
        f"这个环境里还装着原版 cn_clip {found.original}，{effect}；请运行：{REMEDY}（{clone}）",
        f"the original package cn_clip {found.original} is installed here too; {effect}; run: {REMEDY} ({clone})",
    )


def main() -> None:
    """Runs `cn-clip`; warns if the original is installed too, and ends with status 1 if its files replace ours."""
    spec = importlib.util.find_spec("cn_clip")
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    found = look(Path(places[0]) if places else None)
    if (line := problem(found)) is not None:
        print(f"{_both('警告', 'warning') if found.is_ours else _both('错误', 'error')}: {line}", file=sys.stderr)
        if not found.is_ours:
            sys.exit(1)
    from cn_clip.cli import main as run

    run()


def _both(chinese: str, english: str) -> str:
    """As `cn_clip.language` chooses by the environment; that module may be out of reach here."""
    names = ("CN_CLIP_LANG", "LC_ALL", "LC_MESSAGES", "LANG")
    language = next((os.environ[name] for name in names if os.environ.get(name)), "")
    return chinese if language.startswith("zh") else english


if __name__ == "__main__":
    main()
