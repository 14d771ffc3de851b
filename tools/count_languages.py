"""Which errors, help texts and pages exist in both languages: `python tools/count_languages.py`.

--missing ROOM prints the English sentences of a room that have no Chinese, as the JSON that wants it; a room is the
first folder or module below cn_clip, or `help`. --add ROOM FILE puts the Chinese of such a JSON file into the
catalogue, in order. --stale prints the sentences of the catalogue that the source does not hold any more.
"""

import argparse
import ast
import importlib
import io
import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cn_clip import cli, help_page, language  # noqa: E402

PACKAGE = ROOT / "cn_clip"
HELP = "help"
# The room of sentences that only a run composes, or that the system and other packages say.
COMPOSED = "_composed"
# Of programs, never shown by a command: answers over HTTP, which programs read, and faults of the code.
NOT_COUNTED = {"RefusalError", "AssertionError", "NotImplementedError", "PydanticCustomError", "AttributeError"}
# Sentences that a call hands on to an error, by the name of what is called: (position, keyword).
HANDED_ON = {
    "reading": ((None, "what"), (None, "step")),
    "unreadable": ((None, "step"),),
    "UnreadableError.of": ((2, "advice"),),
    "Rule": ((2, "message"),),
    "Fault": ((2, "message"),),
    "needs": ((2, "why"),),
    "excludes": ((2, "why"),),
    "require": ((None, "purpose"),),
    "Skipped": ((1, "reason"),),
    "Damage": ((1, "reason"),),
    "take": ((1, "busy"),),
    "alone": ((1, "busy"),),
    "_refuse": ((0, None),),
    "error_type": ((0, None),),
    "only_torch": ((2, "why"),),
}
NAMES = re.compile(r"\{\}|--[\w-]+|\w+=\w+|\bhf:|cn-clip [a-z ]+$|\bcn_clip[\w.]+|^\w+_\w+$")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


class Sentence(NamedTuple):
    """A sentence of the source as the catalogue writes it, and where it is."""

    room: str
    english: str
    place: str


def room_of(path: Path) -> str:
    """The first folder or module below cn_clip."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def spellings(node: ast.expr | None, names: dict[str, list[ast.expr]]) -> list[str]:
    """What an expression may be, with `{}` for what only a run tells. names: what a name of the function was set to."""
    if isinstance(node, ast.Constant):
        return [str(node.value)] if isinstance(node.value, str) else ["{}"]
    if isinstance(node, ast.JoinedStr):
        return ["".join(str(one.value) if isinstance(one, ast.Constant) else "{}" for one in node.values)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = itertools.product(spellings(node.left, names), spellings(node.right, names))
        return ["".join(both) for both in parts]
    if isinstance(node, ast.IfExp):
        return spellings(node.body, names) + spellings(node.orelse, names)
    if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or):
        return [text for one in node.values for text in spellings(one, names)]
    if isinstance(node, ast.Name) and node.id in names:
        others = {name: values for name, values in names.items() if name != node.id}
        return [text for one in names[node.id] for text in spellings(one, others)]
    return ["{}"]


def called(node: ast.expr) -> str:
    """`reading` of reading(…) and of errors.reading(…), `UnreadableError.of` of that."""
    text = ast.unparse(node)
    return text if text in HANDED_ON else text.rpartition(".")[2]


def handed(node: ast.Call) -> list[ast.expr]:
    """The expressions of a call that become sentences of an error."""
    name = called(node.func)
    given = {one.arg: one.value for one in node.keywords}
    if name in HANDED_ON:
        found = []
        for position, keyword in HANDED_ON[name]:
            if keyword in given:
                found.append(given[keyword])
            elif position is not None and position < len(node.args):
                found.append(node.args[position])
        return found
    if name.endswith("Error") and name not in NOT_COUNTED and node.args:
        return [node.args[0]]
    return []


def assigned(tree: ast.AST) -> dict[str, list[ast.expr]]:
    """Names set to texts in a function, in the module outside of functions: name -> the expressions."""
    found: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in targets:
            if isinstance(target, ast.Name) and isinstance(node, ast.Assign):
                found.setdefault(target.id, []).append(node.value)
    return found


def is_sentence(text: str) -> bool:
    """Whether a text has words of its own, which a catalogue can translate; flags, settings and names are none."""
    return re.search(r"[a-z]{2}", NAMES.sub("", text)) is not None


def errors() -> list[Sentence]:
    """Every sentence of an error of the package, once a room."""
    found: dict[tuple[str, str], Sentence] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for scope, call in calls(tree):
            for expression in handed(call):
                for text in spellings(expression, assigned(scope)):
                    key = room_of(path), text
                    if is_sentence(text) and key not in found:
                        found[key] = Sentence(*key, f"{path.relative_to(ROOT)}:{call.lineno}")
    return list(found.values())


def calls(tree: ast.AST, scope: ast.AST | None = None) -> Iterator[tuple[ast.AST, ast.Call]]:
    """Every call, with the outermost function in which it is, or the module."""
    for node in ast.iter_child_nodes(tree):
        inner = scope or (node if isinstance(node, FUNCTIONS) else None)
        if isinstance(node, ast.Call):
            yield inner or ast.Module(body=[], type_ignores=[]), node
        yield from calls(node, inner)


def texts() -> set[str]:
    """Every text of the package, as the catalogue would write it; help texts are those of a run."""
    found: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Constant, ast.JoinedStr, ast.BinOp, ast.IfExp)):
                found |= set(spellings(node, {}))
    return found | {one.english for one in helps()}


def helps() -> list[Sentence]:
    """The description of every command, and the help of each of its options and arguments."""
    found: dict[str, Sentence] = {}
    for name, command in cli.COMMANDS.items():
        text = help_page.of(importlib.import_module(command.module).Options)
        said = [*help_page.description(text), *(one.help for one in help_page.entries(text))]
        for english in filter(is_sentence, said):
            found.setdefault(english, Sentence(HELP, english, f"cn-clip {name}"))
    return list(found.values())


def is_translated(english: str) -> bool:
    """Whether the catalogue has Chinese for a sentence, whatever its values are."""
    return language.chinese(filled(english)) is not None


def filled(english: str) -> str:
    """A sentence of the catalogue with a value at each `{}`."""
    number = itertools.count()
    return re.sub(r"\{\}", lambda _: f"<{next(number)}>", english)


def pages() -> dict[str, bool]:
    """Name of a page of docs/ -> whether it is in docs/en/, too."""
    return {path.name: (path.parent / "en" / path.name).is_file() for path in sorted((ROOT / "docs").glob("*.md"))}


def shares() -> dict[str, tuple[int, int]]:
    """What is counted -> (how many exist in both languages, of how many)."""
    found: dict[str, tuple[int, int]] = {}
    for one in (*helps(), *errors()):
        kind = "help" if one.room == HELP else f"errors of {one.room}"
        for counted in (kind,) if one.room == HELP else (kind, "errors"):
            have, total = found.get(counted, (0, 0))
            found[counted] = have + is_translated(one.english), total + 1
    have_page = pages()
    return {**dict(sorted(found.items())), "pages": (sum(have_page.values()), len(have_page))}


def missing(room: str | None) -> list[Sentence]:
    """The sentences of a room, or of all, that have no Chinese."""
    return [one for one in (*helps(), *errors()) if room in (None, one.room) and not is_translated(one.english)]


def stale() -> list[str]:
    """The sentences of the catalogue that no text of the package is."""
    known = texts()
    return [english for english in language.catalogue(but=COMPOSED) if english not in known]


def add(room: str, file: Path) -> None:
    """Puts the Chinese of a JSON file into a room of the catalogue; empty ones are left out."""
    path = language.CATALOGUE / f"{room}.json"
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known |= {english: text for english, text in json.loads(file.read_text(encoding="utf-8")).items() if text}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(sorted(known.items())), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Prints the shares, or what an option asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--missing", metavar="ROOM")
    parser.add_argument("--add", nargs=2, metavar=("ROOM", "FILE"))
    parser.add_argument("--stale", action="store_true")
    options = parser.parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if options.add:
        add(options.add[0], Path(options.add[1]))
    elif options.stale:
        print("\n".join(stale()))
    elif options.missing:
        print(json.dumps({one.english: "" for one in missing(options.missing)}, ensure_ascii=False, indent=1))
    else:
        for name, (have, total) in shares().items():
            print(f"{name}: {have} of {total}, {100 * have / max(total, 1):.1f} %")


if __name__ == "__main__":
    main()
