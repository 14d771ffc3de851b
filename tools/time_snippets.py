"""Runs the blocks of README, or of other pages, as the tests do, and prints how long each took.

python tools/time_snippets.py [README.md docs/faq.md …]

Large models are exchanged for small ones, so the seconds are those of starting, importing, reading and writing: what a
change can make slower without a test failing. They are measured on an idle machine; the slowest comes first.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from documents import TIMES, runners  # noqa: E402


def run(pages: list[str]) -> list[dict[str, str | float]]:
    """{"where", "first_line", "seconds"} of each block, slowest first; exits if a page has no test or a block fails."""
    tests = runners()
    if unknown := [page for page in pages if not tests.get(Path(page).name)]:
        sys.exit(
            f"{unknown[0]}: no test runs its blocks; expected one of {', '.join(sorted(filter(tests.get, tests)))}"
        )
    ids = sorted({test for page in pages for test in tests[Path(page).name]})
    with tempfile.TemporaryDirectory() as folder:
        times = Path(folder, "times.jsonl")
        times.touch()
        # Quick tests and those marked long.
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "long or not long", *ids]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, TIMES: str(times)},
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        if done.returncode:
            print(done.stdout)
            sys.exit(done.returncode)
        rows = [json.loads(line) for line in times.read_text(encoding="utf-8").splitlines()]
    return sorted(rows, key=lambda row: -row["seconds"])


def main() -> None:
    rows = run(sys.argv[1:] or ["README.md"])
    print("| 秒 / seconds | 位置 / where | 第一行 / first line |\n| ---: | --- | --- |")
    for row in rows:
        print(f"| {row['seconds']:.1f} | {row['where']} | `{row['first_line']}` |")
    print(f"\n{len(rows)} 个代码块 / blocks, {sum(float(row['seconds']) for row in rows):.0f} s")


if __name__ == "__main__":
    main()
