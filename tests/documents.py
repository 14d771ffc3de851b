"""The documents, their fenced blocks, and which test runs them; for test_docs.py and tools/list_doc_commands.py."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# A page has one language; its English one holds the same commands, which tests run as the Chinese one writes them.
CHINESE = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ENGLISH = [ROOT / "README_En.md", *sorted((ROOT / "docs" / "en").glob("*.md"))]

# Blocks that begin so set up a machine, or take minutes, or need what is not everywhere; only their syntax is checked.
NOT_RUN = {
    "make ": "make 的目标 / a target of make",
    "pip install": "安装 / installs",
    "git clone": "安装 / installs",
    "# 需要": "需要别的软硬件 / needs other hardware or software",
}


def in_english(page: Path) -> Path:
    """The English page of a Chinese one, whether or not it is there."""
    return ROOT / "README_En.md" if page.name == "README.md" else page.parent / "en" / page.name


# Where the tests write how long each block took, if this variable names a file; see tools/time_snippets.py.
TIMES = "CN_CLIP_SNIPPET_TIMES"


class Block(NamedTuple):
    """A fenced block of a document: where it begins, its language, its lines."""

    where: str
    language: str
    code: str

    @property
    def headline(self) -> str:
        """The first line that is a command."""
        return next((line.strip() for line in self.code.splitlines() if line.strip()), "")


def blocks(path: Path) -> list[Block]:
    """The fenced blocks in order."""
    text = path.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(f"{path.name}:{text[: one.start()].count(chr(10)) + 1}", one[1], one[2]) for one in found]


def is_command(block: Block) -> bool:
    """Whether it is for typing, not for reading alone."""
    return block.language in ("bash", "python")


def is_run(block: Block) -> bool:
    """Whether a test has to run it."""
    return is_command(block) and not block.code.startswith(tuple(NOT_RUN))


def runners() -> dict[str, list[str]]:
    """Ids of the tests that run the blocks of a document, by its name: those that take blocks and name the document."""
    found: dict[str, list[str]] = {path.name: [] for path in CHINESE}
    for file in sorted((ROOT / "tests").glob("test_*.py")):
        source = file.read_text(encoding="utf-8")
        for test, code in _tests(source):
            if re.search(r"\b(run_all\(|run_page\(|blocks\b)", code):
                for name in set(re.findall(r'"([\w-]+\.md)"', code)) & found.keys():
                    found[name].append(f"tests/{file.name}::{test}")
    return found


def _tests(source: str) -> Iterator[tuple[str, str]]:
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node.name, "\n".join(lines[node.lineno - 1 : node.end_lineno])
