"""The help of a command and what its parser refuses, as plain lines in the reader's language, for `command`.

tyro draws boxes, counts a Chinese character as one cell and speaks English. So it prints at a width at which nothing is
wrapped into a buffer, from which this module takes what it says and lays it out: no colour, no box, readable from 40
columns on.
"""

import contextlib
import io
import os
import re
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

import tyro

from cn_clip import spelling, terminal
from cn_clip.language import both, translated
from cn_clip.progress import cells_of

HELP = "Show this help and exit"
CONFIG = (tyro.conf.FlagCreatePairsOff,)
_WIDTH = "4000"
# The column of options; a longer option has a line of its own, and so has every one on a narrow terminal.
_LEFT, _NARROW, _WIDEST = 26, 60, 120


class Entry(NamedTuple):
    """An option or argument: how it is written, its help in English, its default or "".

    hint: required, repeatable or "".
    """

    written: str
    help: str
    default: str = ""
    hint: str = ""

    @property
    def is_flag(self) -> bool:
        """Whether it is an option, not an argument that its place names."""
        return self.written.startswith("-")


class Said(NamedTuple):
    """What tyro printed: to standard output and to standard error."""

    out: str
    err: str


@contextlib.contextmanager
def overheard() -> Iterator[list[Said]]:
    """Holds back what is printed inside, wide and without colours; the list has it after the end."""
    found: list[Said] = []
    buffers = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="surrogatepass") for _ in range(2)]
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = _WIDTH
    try:
        with contextlib.redirect_stdout(buffers[0]), contextlib.redirect_stderr(buffers[1]):
            yield found
    finally:
        del os.environ["COLUMNS"]
        if columns is not None:
            os.environ["COLUMNS"] = columns
        texts = []
        for buffer in buffers:
            buffer.flush()
            texts.append(buffer.buffer.getvalue().decode("utf-8", "surrogatepass"))
        found.append(Said(*texts))


def of(options: type[Any]) -> str:
    """The help of a command as tyro prints it, in English; its Options class, from which `page` is made."""
    with overheard() as said, contextlib.suppress(SystemExit):
        tyro.cli(options, args=["--help"], config=CONFIG)
    return said[0].out


def page(text: str) -> str:
    """The help that tyro printed, laid out for the terminal; text of another form as it is."""
    if not text.startswith("usage: "):
        return text.rstrip("\n")
    columns = min(shutil.get_terminal_size().columns, _WIDEST)
    listed = list(entries(text))
    positional = [one for one in listed if not one.is_flag]
    lines = terminal.wrap(usage(text, positional), columns, indent=4)
    for paragraph in description(text):
        lines += ["", *terminal.wrap(translated(paragraph), columns)]
    options = [Entry("-h, --help", HELP)]
    options += [one for one in listed if one.is_flag]
    for title, group in ((both("参数", "arguments"), positional), (both("选项", "options"), options)):
        if group:
            lines += ["", both(f"{title}：", f"{title}:")]
            lines += [line for one in group for line in laid_out(one, columns)]
    return "\n".join(lines)


def usage(text: str, positional: list[Entry]) -> str:
    """The first line: how the command is called."""
    program = text.removeprefix("usage: ").partition(" [-h]")[0]
    words = " ".join([program, *(one.written for one in positional), both("[选项]", "[OPTIONS]")])
    return both(f"用法：{words}", f"usage: {words}")


def description(text: str) -> list[str]:
    """The paragraphs between the usage and the first box."""
    whole = text.partition("\n\n")[2].partition("╭")[0].strip()
    return [" ".join(one.split()) for one in re.split(r"\n\s*\n", whole) if one.strip()]


def entries(text: str) -> Iterator[Entry]:
    """The options and arguments of all boxes but --help itself, in order.

    In a box one is `WRITTEN  help` in one line, or its help in an indented line of its own.
    """
    lines = [line.strip("│").rstrip()[1:] for line in text.splitlines() if line.startswith("│")]
    found: list[str] = []
    for line in lines:
        if line.startswith(" ") and found:
            found[-1] += f"  {line.strip()}"
        else:
            found.append(line)
    for entry in found:
        written, *said = re.split(r"\s{2,}", entry, maxsplit=1)
        if not written.startswith("-h,"):
            yield _entry(written, " ".join(" ".join(said).split()))


def _entry(written: str, said: str) -> Entry:
    """Takes what tyro adds out of the help: a default, or that the option is required or may be repeated."""
    found = re.fullmatch(r"(.*?)\s*\((?:default: (.*)|(required|repeatable))\)", said)
    text, default, hint = (found[1], found[2], found[3]) if found else (said, None, None)
    shown = "" if default in (None, "None", "False") else str(default)
    written = re.sub(r"\{None\}\||\|\{None\}|(?<=\{)None,", "", written)
    return Entry(written, text, shown, hint or "")


def hinted(one: Entry) -> str:
    """The help of an entry in the reader's language, and what is known of its value."""
    words = {
        "required": both("（必填）", " (required)"),
        "repeatable": both("（可重复给出）", " (may be repeated)"),
        "": both(f"（默认：{one.default}）", f" (default: {one.default})") if one.default else "",
    }
    return (translated(one.help) + words[one.hint]).strip()


def laid_out(one: Entry, columns: int) -> list[str]:
    """The lines of one entry: its help beside it, or below it if there is little room."""
    text = hinted(one)
    left = 6 if columns < _NARROW else _LEFT
    helped = [" " * left + line for line in terminal.wrap(text, columns - left)] if text else []
    if helped and columns >= _NARROW and cells_of(one.written) <= left - 4:
        return [terminal.pad(f"  {one.written}", left) + helped[0][left:], *helped[1:]]
    return ["  " + line for line in terminal.wrap(one.written, columns - 2, indent=4)] + helped


def refusal(text: str) -> str:
    """One English sentence on what tyro refuses, from the box that it draws; text of another form on one line."""
    lines = [line.strip("│").rstrip()[1:] for line in text.splitlines() if line.startswith("│")]
    if not lines:
        return " ".join(text.split())
    rules = [number for number, line in enumerate(lines) if line and not line.strip("─")] or [len(lines)]
    said, rest = lines[: rules[0]], lines[rules[0] + 1 :]
    footer = re.search(r"(?:For full helptext, (?:run|see)):?\s+(.*?) --help", " ".join(lines))
    sentence = _sentence(" ".join(" ".join(said).split()), said, rest)
    if not footer:
        return sentence
    return f"{sentence}{' See' if sentence.endswith('?') else '; see'} `{footer[1].strip()} --help`"


def _sentence(said: str, lines: list[str], rest: list[str]) -> str:
    if found := re.fullmatch(r"invalid choice '(.*)' for argument '(.*)'\. Expected one of \((.*)\)\.", said):
        choices = re.findall(r"'([^']*)'", found[3])
        nearest = spelling.nearest(found[1], choices)
        meant = f"; did you mean {nearest}?" if nearest else ""
        return f"{_first(found[2])}: expected one of {', '.join(choices)}, got {found[1]!r}{meant}"
    if found := re.fullmatch(r"Missing value for argument '(.*)'\. Expected \d+ values\.", said):
        return f"{_first(found[1])}: expected a value"
    if said.startswith("Missing from "):
        names = [line.split()[0].rstrip(",") for line in lines if re.match(r" {4}\S", line)]
        return f"missing: {', '.join(names)}; each is required"
    if found := re.fullmatch(r"Unrecognized options: (.*)", said):
        near = next((line.split()[0].rstrip(",") for line in rest if re.match(r" {4}--", line)), None)
        return f"{found[1]}: no such option or argument" + (f"; did you mean {near}?" if near else "")
    if found := re.fullmatch(r"Error parsing (\S+): invalid literal for int\(\) with base 10: (.*)", said):
        return f"{_first(found[1])}: expected a whole number, got {found[2]}"
    if found := re.fullmatch(r"Error parsing (\S+): could not convert string to float: (.*)", said):
        return f"{_first(found[1])}: expected a number, got {found[2]}"
    return said.removeprefix("Error parsing ")


def _first(written: str) -> str:
    """The first of several spellings of an option."""
    return written.partition("/")[0].partition(",")[0]
