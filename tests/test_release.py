"""What a release publishes: versions agree, licences are whole, and the files that hosts and tools read are valid."""

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import cn_clip

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
check_release: Any = importlib.import_module("check_release")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_version_changelog_and_citation_agree() -> None:
    assert check_release.told_version() == cn_clip.__version__
    check_release.published_facts(ROOT, cn_clip.__version__)


@pytest.fixture
def tagged(tmp_path: Path) -> Path:
    for name in ("CITATION.cff", "CHANGELOG.md", "CHANGELOG_En.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"], ["tag", f"v{cn_clip.__version__}"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    return tmp_path


def test_a_tagged_version_without_a_date_is_refused(tagged: Path) -> None:
    for name in ("CHANGELOG.md", "CHANGELOG_En.md"):
        text = (tagged / name).read_text(encoding="utf-8")
        head = rf"## \[{re.escape(cn_clip.__version__)}\] - "
        (tagged / name).write_text(re.sub(head + ".*", head.replace("\\", "") + "soon", text), encoding="utf-8")
    with pytest.raises(SystemExit, match="is tagged, but has 'soon' in place of a date"):
        check_release.published_facts(tagged, cn_clip.__version__)
    for name in ("CHANGELOG.md", "CHANGELOG_En.md"):
        text = (tagged / name).read_text(encoding="utf-8")
        (tagged / name).write_text(text.replace("] - soon", "] - 2030-01-31"), encoding="utf-8")
    check_release.published_facts(tagged, cn_clip.__version__)
    with pytest.raises(SystemExit, match=re.escape(f"version {cn_clip.__version__}, expected 9.9.9")):
        check_release.published_facts(tagged, "9.9.9")


def test_both_changelogs_have_the_same_parts() -> None:
    chinese, english = ((ROOT / name).read_text(encoding="utf-8") for name in ("CHANGELOG.md", "CHANGELOG_En.md"))
    marks = [re.findall(r"^(?:#+|-) ", text, re.MULTILINE) for text in (chinese, english)]
    assert marks[0] == marks[1]
    versions = [re.findall(r"^## \[(.+?)\]", text, re.MULTILINE) for text in (chinese, english)]
    assert versions[0] == versions[1]
    codes = [sorted(re.findall(r"`([^`]+)`", text)) for text in (chinese, english)]
    assert codes[0] == codes[1]


def test_the_changelog_names_commands_that_exist() -> None:
    cli = importlib.import_module("cn_clip.cli")
    line = next(line for line in (ROOT / "CHANGELOG_En.md").read_text().splitlines() if "The command `cn-clip`" in line)
    first_words = {name.split()[0] for name in cli.COMMANDS}
    assert set(re.findall(r"`([a-z-]+)`", line)) - {"cn-clip"} <= first_words


def test_the_text_of_every_licence_is_packed() -> None:
    (expression,) = re.findall(r'^license = "(.+)"$', PYPROJECT, re.MULTILINE)
    assert set(expression.split(" AND ")) == check_release.LICENCES.keys()
    (listed,) = re.findall(r"^license-files = \[(.*?)\]", PYPROJECT, re.MULTILINE | re.DOTALL)
    patterns = re.findall(r'"(.+?)"', listed)
    files = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    assert all(any(ROOT.glob(pattern)) for pattern in patterns)
    texts = [path.read_text(encoding="utf-8").lower() for path in files]
    for name, line in check_release.LICENCES.items():
        assert any(line.lower() in text for text in texts), name
    # The notice links to each of them, and to what exists only.
    notice = (ROOT / "NOTICE.md").read_text(encoding="utf-8")
    links = set(re.findall(r"\]\(([^)]+)\)", notice))
    assert all((ROOT / link).is_file() for link in links)
    assert {path.relative_to(ROOT).as_posix() for path in files if path.name.startswith("LICENSE-")} - links == {
        "tools/emoji_dataset/twemoji/LICENSE-Unicode-3.0.txt"  # the same as the one that is linked
    }


def test_the_font_s_licence_is_that_of_its_archive() -> None:
    zipfile = importlib.import_module("zipfile")
    with zipfile.ZipFile(ROOT / "cn_clip" / "data" / "noto_sans_sc.zip") as archive:
        assert archive.read("OFL.txt") == (ROOT / "tools" / "grid_font" / "LICENSE-OFL-1.1.txt").read_bytes()


def test_the_citation_is_of_this_version_and_of_the_paper() -> None:
    citation = load(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0"
    assert citation["preferred-citation"]["url"] == "https://arxiv.org/abs/2211.01335"
    # The authors as README cites them.
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    names = [f"{one['family-names']}, {one['given-names']}" for one in citation["preferred-citation"]["authors"]]
    assert " and ".join(names) in readme
    assert citation["preferred-citation"]["title"] in readme


TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


@pytest.mark.parametrize("path", [path for path in TEMPLATES if path.name != "config.yml"], ids=lambda path: path.stem)
def test_an_issue_form_is_one_that_github_reads(path: Path) -> None:
    form = load(path)
    assert {"name", "description", "body"} <= form.keys()
    ids = [part["id"] for part in form["body"] if part["type"] != "markdown"]
    assert len(ids) == len(set(ids))
    for part in form["body"]:
        assert part["type"] in ("markdown", "textarea", "input", "dropdown", "checkboxes")
        text = part["attributes"]["value" if part["type"] == "markdown" else "label"]
        assert re.search(r"[\u4e00-\u9fff]", text), text
        assert re.search(r"[A-Za-z]{3}", text), text


def test_hooks_run_the_tools_of_the_checkout_and_download_nothing() -> None:
    repos = load(ROOT / ".pre-commit-config.yaml")["repos"]
    assert [repo["repo"] for repo in repos] == ["local"]
    hooks = {hook["id"]: hook for hook in repos[0]["hooks"]}
    assert all(hook["language"] == "system" and hook["entry"].startswith(".venv/bin/") for hook in hooks.values())
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    check = re.findall(r"^\t\$\(BIN\)/(\S+)", makefile.partition("\ncheck: ")[2].partition("\n\n")[0], re.MULTILINE)
    assert {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in hooks.values()} - {"python"} == set(check)


def test_the_package_says_that_it_is_typed_and_names_no_address_that_is_made_up() -> None:
    assert (ROOT / "cn_clip" / "py.typed").is_file()
    assert '"Typing :: Typed"' in PYPROJECT
    urls = re.findall(r'^"?[\w -]+"? = "(https://[^"]+)"', PYPROJECT.partition("[project.urls]")[2], re.MULTILINE)
    assert urls
    assert not any(word in url for url in urls for word in ("example", "OWNER", "your-", "placeholder"))
