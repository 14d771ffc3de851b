"""Which test runs which command of the documents, as a Markdown table: `python tools/list_doc_commands.py`.

English pages hold the same commands, and are not listed a second time.
With `--print FILE WORD`, the first Python block of FILE that holds WORD.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from documents import CHINESE, NOT_RUN, Block, blocks, is_command, is_run, runners

LONGEST = 60


def fate(block: Block, tests: list[str]) -> str:
    """The test that runs the block, or why its syntax alone is checked."""
    if is_run(block):
        return "<br>".join(f"`{test}`" for test in tests) or "**没有 / none**"
    return "只查语法 / syntax only：" + next(why for start, why in NOT_RUN.items() if block.code.startswith(start))


def table() -> Iterator[str]:
    """The lines of the table."""
    yield "| 位置 / where | 第一行 / first line | 运行它的测试 / run by |"
    yield "| --- | --- | --- |"
    tests = runners()
    for path in CHINESE:
        for block in filter(is_command, blocks(path)):
            first = block.headline.rstrip("\\ ").replace("|", "\\|")
            first = first if len(first) <= LONGEST else f"{first[: LONGEST - 1]}…"
            yield f"| {block.where} | `{first}` | {fate(block, tests[path.name])} |"


def main() -> None:
    if sys.argv[1:2] == ["--print"]:
        path, word = sys.argv[2:]
        print(next(one.code for one in blocks(Path(path)) if one.language == "python" and word in one.code))
    else:
        print("\n".join(table()))


if __name__ == "__main__":
    main()
