"""The demo from beginning to end, with few training steps or none, and the page it ends in."""

import base64
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import warm_python
from PIL import Image

from cn_clip import command
from cn_clip.demo import next_steps
from cn_clip.index import build, search
from cn_clip.retrieval.store import open_index
from cn_clip.serve import main as serve

ROOT = Path(__file__).resolve().parent.parent


def environment(**more: str) -> dict[str, str]:
    """With the shortcuts that the tests have set by then."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


# Every eighth of the 1,610 drawings; all of them are for `make test-long`.
WITH_FEW = """
import sys
from cn_clip import cli
from cn_clip.demo import emoji
whole = emoji.load
emoji.load = lambda vendor="noto": whole(vendor)[::8]
cli.main(sys.argv[1:])
"""
NUM_FEW, NUM_HELD_OUT = 202, 40


def run(*words: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    line = [warm_python.program(), *map(str, words)]
    return subprocess.run(line, cwd=ROOT, env=environment(**more), capture_output=True, encoding="utf-8", check=False)


class Page(HTMLParser):
    """The elements of a page with their attributes and texts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "line", "polyline", "circle", "rect"):
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        for tag in self._open:
            self.texts[tag][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


class Demo:
    """A whole run in English with `--json`, and the same command again in Chinese for people."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        first = run("-c", WITH_FEW, "demo", f"--output={folder}", "--steps=2", "--json")
        assert first.returncode == 0, first.stderr
        assert first.stderr == ""
        self.summary: dict[str, Any] = json.loads(first.stdout)
        self.page = Page(folder / "index.html")
        self.log = (folder / "demo.log").read_text(encoding="utf-8")
        self.again = run("-c", WITH_FEW, "demo", f"--output={folder}", "--steps=2", CN_CLIP_LANG="zh")
        assert self.again.returncode == 0, self.again.stderr
        self.chinese_page = Page(folder / "index.html")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return Demo(tmp_path_factory.mktemp("demo") / "a folder")


def test_recall_is_that_of_pictures_that_were_held_out_of_the_training(demo: Demo) -> None:
    data = demo.folder / "datasets" / "emoji"
    rows = {split: (data / f"{split}_imgs.tsv").read_text().splitlines() for split in ("train", "valid")}
    learned, held_out = ({int(row.split("\t")[0]) for row in rows[split]} for split in ("train", "valid"))
    assert (len(learned), len(held_out)) == (NUM_FEW - NUM_HELD_OUT, NUM_HELD_OUT)
    assert not learned & held_out
    assert (demo.summary["learned"], demo.summary["held_out"]) == (len(learned), len(held_out))
    for stage in ("before", "after"):
        for way in ("text_to_image", "image_to_text"):
            scores = demo.summary[stage][way]
            assert set(scores) == {"score", "mean_recall", "r1", "r5", "r10"}
            # Chance is 2.5 % at 1; two steps of warm-up do not undo what the model knows.
            assert 60 < scores["r1"] < scores["r10"] <= 100
            result = json.loads((demo.folder / "results" / f"{stage}_{way}.json").read_text())
            assert result["scoreJson"] == scores
        features = (demo.folder / "results" / f"{stage}.img_feat.jsonl").read_bytes().splitlines()
        assert {json.loads(line)["image_id"] for line in features} == held_out
    assert 0.4 < demo.summary["zeroshot"] <= 1  # of 25 classes
    with Image.open(demo.summary["grid"]) as grid:
        assert grid.format == "PNG"
        assert min(grid.size) > 400


def test_the_page_shows_what_was_measured(demo: Demo) -> None:
    cells = [text.strip() for text in demo.page.texts["td"]]
    keys = ("r1", "r5", "r10", "mean_recall")
    measured = [
        f"{demo.summary[stage][way][key]:.1f}"
        for way in ("text_to_image", "image_to_text")
        for stage in ("before", "after")
        for key in keys
    ]
    assert cells == measured
    assert f"{demo.summary['zeroshot']:.1%}".replace("%", " %") in demo.page.texts["main"][0]
    (changes,) = re.findall(r"(\d+) ranks are better, (\d+) are worse, (\d+) are the same", demo.page.texts["main"][0])
    better, worse, same = map(int, changes)
    assert better + worse + same == NUM_HELD_OUT
    titles = [found["aria-label"] for found in demo.page.all("svg")]
    assert len(titles) == 2
    last = demo.summary["after"]
    assert f"{last['text_to_image']['r1']:.1f}; image → text" in str(titles[1])
    assert str(titles[1]).endswith(f"{last['image_to_text']['r1']:.1f}")


def test_the_page_is_one_file_that_runs_and_fetches_nothing(demo: Demo) -> None:
    for page in (demo.page, demo.chinese_page):
        assert {tag for tag, _ in page.elements}.isdisjoint({"script", "link", "iframe", "object", "form", "base"})
        assert all(str(found["href"]).startswith("#") for found in page.all("a"))
        pictures = [str(found["src"]) for found in page.all("img")]
        assert len(pictures) >= 3 * 2 * 6
        for uri in set(pictures):
            head, _, data = uri.partition(",")
            assert head == "data:image/webp;base64"
            with Image.open(BytesIO(base64.b64decode(data))) as picture:
                assert picture.size == (64, 64)
        assert all(found["alt"] for found in page.all("img"))
        assert "url(" not in page.texts["style"][0]
    assert "CC BY 4.0" in demo.page.texts["footer"][0]


def test_a_frame_is_green_where_the_name_is_the_query(demo: Demo) -> None:
    queries = [text.strip() for text in demo.page.texts["h4"]]
    assert len(queries) >= 3
    hits = [found for found in demo.page.all("li") if "shot" in str(found.get("class"))]
    names = [
        text.strip() for text, found in zip(demo.page.texts["li"], demo.page.all("li"), strict=True) if found in hits
    ]
    shown = [(name, found["class"]) for name, found in zip(names, hits, strict=True)]
    assert len(shown) == len(queries) * 2 * 6
    for number, (name, style) in enumerate(shown):
        assert (style == "shot right") == (name == queries[number // 12])


def test_people_get_ten_lines_and_the_log_has_the_rest(demo: Demo) -> None:
    lines = demo.again.stdout.splitlines()
    assert len(lines) <= 12
    assert demo.again.stderr == ""
    assert all(re.search("[一-龥]", line) for line in lines)
    assert lines[-1].endswith(next_steps.opener(demo.folder / "index.html"))
    assert f"{demo.summary['after']['text_to_image']['r1']:.1f} %" in demo.again.stdout
    commands = re.findall(r"^\$ (cn-clip \w+|python -m [\w.]+)", demo.log, re.MULTILINE)
    assert len(commands) == 15
    assert {"cn-clip features", "cn-clip topk", "cn-clip recall", "cn-clip train"} <= set(commands)
    assert "| INFO |" in demo.log
    assert "| WARNING |" not in demo.log
    assert "Params:" in demo.log


def test_the_page_has_the_language_of_the_reader(demo: Demo) -> None:
    assert [page.all("html")[0]["lang"] for page in (demo.page, demo.chinese_page)] == ["en", "zh-CN"]
    assert "召回率" in demo.chinese_page.texts["main"][0]
    assert "Recall" not in demo.chinese_page.texts["main"][0]
    for heading in demo.page.texts["h2"]:
        assert heading.isascii()


def test_the_next_commands_are_such_as_the_commands_take(demo: Demo) -> None:
    typed = [text.split("\n")[-1] for text in demo.page.texts["pre"][:5]]
    words = [shlex.split(line) for line in typed]
    assert all(line[: len(next_steps.program())] == next_steps.program() for line in words)
    told = [line[len(next_steps.program()) :] for line in words]
    assert [line[0] for line in told] == ["index", "search", "serve", "index", "search"]
    own = command.parse(build.Options, told[0][2:])
    assert Path(own.source) == next_steps.pictures_folder()
    assert command.parse(search.Options, told[1][1:]).index == own.output
    assert command.parse(serve.Options, told[2][1:]).index == (own.output,)
    # The last two run here: the index of what was learned, by the model that learned it.
    for line in typed[3:]:
        line = line.replace(sys.executable, warm_python.program(), 1)
        done = subprocess.run(["bash", "-c", line], cwd=ROOT, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    index = open_index(command.parse(build.Options, told[3][2:]).output or "")
    assert len(index) == NUM_FEW - NUM_HELD_OUT
    assert len(done.stdout.splitlines()) >= 10


@pytest.mark.long
def test_the_bundled_model_alone_is_measured_on_all_drawings(tmp_path: Path) -> None:
    result = run("cn_clip/demo/main.py", f"--output={tmp_path}", "--steps=0", "--json")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["after"] is None
    assert (summary["learned"], summary["held_out"]) == (1288, 322)
    assert summary["before"]["text_to_image"]["r10"] > 90
    assert "$ cn-clip train" not in (tmp_path / "demo.log").read_text(encoding="utf-8")
    assert not (tmp_path / "experiments").exists()
    page = Page(tmp_path / "index.html")
    assert not page.all("svg")
    assert len(page.texts["td"]) == 8


@pytest.mark.long
def test_fine_tuning_as_the_demo_does_it_improves_what_was_held_out(tmp_path: Path) -> None:
    result = run("-m", "cn_clip", "demo", f"--output={tmp_path}", "--json")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    for way in ("text_to_image", "image_to_text"):
        for key in ("r1", "mean_recall"):
            assert summary["after"][way][key] > summary["before"][way][key]


@pytest.mark.long
def test_a_demo_that_is_stopped_goes_on_when_it_is_run_again(tmp_path: Path) -> None:
    words = [warm_python.program(), "-c", WITH_FEW, "demo", f"--output={tmp_path}", "--steps=12"]
    log = tmp_path / "demo.log"
    with subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, encoding="utf-8") as process:
        deadline = time.monotonic() + 240
        while not log.exists() or "Global Steps: 5/12" not in log.read_text(encoding="utf-8"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        printed = process.communicate()[0]
    assert process.returncode == 128 + signal.SIGTERM
    assert printed.splitlines()[-1] == "Stopped; the same command again goes on from here."
    assert not (tmp_path / "index.html").exists()
    again = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, encoding="utf-8")
    assert again.returncode == 0, again.stderr
    assert "Global Steps: 5/12" not in log.read_text(encoding="utf-8")
    assert "Global Steps: 10/12" in log.read_text(encoding="utf-8")
    assert (tmp_path / "index.html").exists()


@pytest.mark.parametrize("steps", ["-1", "few"])
def test_steps_that_are_none_are_refused(steps: str, tmp_path: Path) -> None:
    result = run("cn_clip/demo/main.py", f"--output={tmp_path}", f"--steps={steps}")
    assert result.returncode != 0
    assert "--steps" in result.stderr


@pytest.mark.parametrize("place", ["taken", "taken/deep/er"])
def test_a_file_in_the_place_of_the_output_is_named(place: str, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    result = run("cn_clip/demo/main.py", f"--output={tmp_path / place}", "--steps=0")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path / 'taken'}")
    assert line.endswith(": Not a directory; a part of the path is a file; choose another")


# --- the next steps


def test_commands_are_quoted_for_the_shell_of_the_machine() -> None:
    words = [r"C:\Users\李 雷\py.exe", "-m", "cn_clip", "search", "O'Neil", "海边的日落", "--k", "5"]
    assert next_steps.typed(words, on_windows=True) == (
        r"& 'C:\Users\李 雷\py.exe' -m cn_clip search 'O''Neil' '海边的日落' --k 5"
    )
    assert next_steps.typed(["cn-clip", "serve", r"C:\a"], on_windows=True) == r"cn-clip serve C:\a"
    assert shlex.split(next_steps.typed(words, on_windows=False)) == words


def test_the_folder_is_where_the_user_keeps_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEDRIVE", raising=False)
    assert next_steps.pictures_folder(tmp_path) == tmp_path / "Pictures"
    (tmp_path / ".config").mkdir()
    settings = 'XDG_MUSIC_DIR="$HOME/音乐"\nXDG_PICTURES_DIR="$HOME/图片"\n'
    (tmp_path / ".config" / "user-dirs.dirs").write_text(settings, encoding="utf-8")
    assert next_steps.pictures_folder(tmp_path) == tmp_path / "Pictures"
    (tmp_path / "图片").mkdir()
    assert next_steps.pictures_folder(tmp_path) == tmp_path / "图片"


def test_the_page_for_the_browser_brings_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(next_steps.importlib.util, "find_spec", lambda name: None)
    install, started = next_steps.own_folder()[2].splitlines()
    assert shlex.split(install)[1:] == ["-m", "pip", "install", "cn-clip-next[page]"]
    assert shlex.split(started)[-3:] == ["serve", "photos.index", "--originals"]
