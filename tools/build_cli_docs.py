"""Writes docs/cli.md, every option as `--help` tells it: `python tools/build_cli_docs.py`; `--check` only compares."""

import contextlib
import importlib
import io
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cn_clip import cli

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
# So wide that no line of help is wrapped, and no colours: the page is the same wherever it is written.
TERMINAL = {"COLUMNS": "4000", "NO_COLOR": "1"}
HEAD = """# 命令参考 / Command reference

*Summary: every command of `cn-clip` with all its options, as `--help` tells them. This page is generated: after
a change of options run `make docs-cli`.*

本页由 `make docs-cli` 从各命令的 `--help` 生成，不要手改。选项里的 `-` 和 `_` 可以互换；每条命令也可以直接运行脚本。
选项的说明目前只有英文。
"""
TABLE_HEAD = ["| 选项 / option | 作用 / what it does | 默认 / default |", "| --- | --- | --- |"]


class Row(NamedTuple):
    """An option or argument as Markdown: how it is written, what it does, what it is when not given, or ""."""

    written: str
    help: str
    default: str


def help_of(name: str) -> str:
    """What `cn-clip NAME --help` prints."""
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    sys.argv[0] = f"{cli.PROG} {name}"
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        importlib.import_module(cli.COMMANDS[name].module).main(["--help"])
    printed.seek(0)
    return printed.read()


def description(text: str) -> str:
    """What stands between the usage and the first box."""
    return text.split("\n\n", 1)[1].split("╭", 1)[0].strip()


def rows(text: str) -> Iterator[Row]:
    """The entries of all boxes but --help itself, in order.

    An entry is `WRITTEN  help` in one line, or its help in an indented line of its own.
    """
    lines = [line.strip("│").rstrip()[1:] for line in text.splitlines() if line.startswith("│")]
    entries: list[str] = []
    for line in lines:
        if line.startswith(" ") and entries:
            entries[-1] += f"  {line.strip()}"
        else:
            entries.append(line)
    for entry in entries:
        written, *said = re.split(r"\s{2,}", entry, maxsplit=1)
        if not written.startswith("-h,"):
            yield row(written, *said)


def row(written: str, said: str = "") -> Row:
    """Takes the default out of the help; None stands for "not given"."""
    written = written.replace("{None}|", "").replace("{None,", "{")
    told = re.fullmatch(r"(.*?)\s*\((?:default: (.*)|(required))\)", said)
    text, default = (told[1], told[2]) if told else (said, None)
    if told and told[3]:
        return Row(code(written), prose(text), "必填 / required")
    return Row(code(written), prose(text), "" if default in (None, "None", "False") else code(default))


def code(text: str) -> str:
    """Text as code in a cell of a table."""
    return f"`{text}`".replace("|", "\\|")


def prose(text: str) -> str:
    """Text in which no column, tag or emphasis begins by chance; what stands in backticks stays."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([*<_|~])", r"\\\1", part) for part in parts)


def section(name: str) -> str:
    """Heading, description and table of one command."""
    command, text = cli.COMMANDS[name], help_of(name)
    script = command.module.replace(".", "/") + ".py"
    table = [f"| {one.written} | {one.help} | {one.default} |" for one in rows(text)]
    parts = [
        f"## cn-clip {name}",
        f"{command.chinese} / {command.english} (`{script}`)",
        prose(description(text)),
        "\n".join([*TABLE_HEAD, *table]) if table else "",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *map(section, cli.COMMANDS)])


def main() -> int:
    os.environ.update(TERMINAL)
    os.environ.pop("FORCE_COLOR", None)
    written = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(written, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == written:
        return 0
    print("docs/cli.md 过时 / is out of date: make docs-cli", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
