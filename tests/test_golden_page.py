"""An heir finds each answer on one page; the page on golden files names every one of them and its program."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
PAGES = [ROOT / "docs" / "golden.md", ROOT / "docs" / "en" / "golden.md"]


def rows(page: Path) -> list[list[str]]:
    """The cells of every row of its tables, headings aside."""
    lines = re.findall(r"^\| `.*\|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def programs(page: Path) -> set[str]:
    """The programs of the repository that it says to run."""
    return set(re.findall(r"(?:tools|benchmarks)/[\w/]+\.(?:py|sh)", page.read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_golden_file_has_a_row(page: Path) -> None:
    named = [name.rstrip("/") for row in rows(page) if len(row) == 4 for name in re.findall(r"`([^`]+)`", row[0])]
    assert sorted(named) == sorted(path.name for path in GOLDEN.iterdir())


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_command_runs_a_program_of_the_repository_and_every_recorder_is_named(page: Path) -> None:
    assert all((ROOT / program).is_file() for program in programs(page))
    recorders = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tools" / "golden").glob("record_*.py")}
    assert recorders <= programs(page)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_a_row_names_what_its_program_writes(page: Path) -> None:
    for row in rows(page):
        if len(row) != 4 or "record_log" in row[2]:  # that one is given the folder
            continue
        (script,) = re.findall(r"tools/golden/record_\w+\.py", row[2])
        # Some take the path from the test that reads the files.
        sources = [script, *(f"tests/{module}.py" for module in ("pipeline_weights", "test_row_store"))]
        source = "".join((ROOT / one).read_text(encoding="utf-8") for one in sources)
        for name in re.findall(r"`([^`]+)`", row[0]):
            assert name.rstrip("/") in source, (script, name)


def test_the_bundled_model_is_trained_by_the_commands_of_its_card() -> None:
    card = (ROOT / "cn_clip" / "clip" / "bundled" / "MODEL_CARD.md").read_text(encoding="utf-8")
    script = (ROOT / "tools" / "train_bundled_model.sh").read_text(encoding="utf-8").replace('"${checkout}/', "")
    (block,) = re.findall(r"```bash\npip install resvg-py\n(.*?)```", card, re.DOTALL)

    def words(text: str) -> list[str]:
        return re.sub(r"(?m)\s*#.*$|\\\n", " ", text).replace('.py"', ".py").split()

    listed, run = words(block), words(script)
    first, packing = run.index("python"), ["--output", "emoji_tiny.safetensors"]
    assert run[first:] == [*listed, *packing]


def anchors(page: Path) -> set[str]:
    """Those of its headings, as the site and GitHub make them."""
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_each_question_of_an_heir_is_answered_by_one_page() -> None:
    page = ROOT / "docs" / "contributing.md"
    section = page.read_text(encoding="utf-8").partition("## 接手的人会问的")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 13
    for row in rows:
        ((target, anchor),) = re.findall(r"\]\(([^)#]+)#?([^)]*)\)", row)
        answer = page.parent / target
        assert answer.is_file(), row
        assert not anchor or anchor in anchors(answer), row
