"""The demo from beginning to end, with few training steps or none."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import warm_python
from PIL import Image

from cn_clip.demo.tour import EPILOGUE
from cn_clip.retrieval.store import open_index

ROOT = Path(__file__).resolve().parent.parent


def environment() -> dict[str, str]:
    """With the shortcuts that the tests have set by then."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


# Every eighth of the 1,610 drawings; all of them are for `make test-long`.
WITH_FEW = """
import sys
from cn_clip import cli
from cn_clip.demo import emoji
whole = emoji.load
emoji.load = lambda vendor="noto": whole(vendor)[::8]
cli.main(sys.argv[1:])
"""
NUM_FEW = 202


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    words = [warm_python.program(), *map(str, command)]
    return subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)


def test_demo_runs_the_whole_job_and_prints_one_json_object(tmp_path: Path) -> None:
    result = run("-c", WITH_FEW, "demo", f"--output={tmp_path}", "--steps=2", "--json")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    for stage in ("before", "after"):
        for way in ("text_to_image", "image_to_text"):
            scores = summary[stage][way]
            assert set(scores) == {"score", "mean_recall", "r1", "r5", "r10"}
            # Chance is 0.5 % at 1; two steps of warm-up do not undo what the model knows.
            assert 50 < scores["r1"] < scores["r5"] < scores["r10"] <= 100
    assert 0.4 < summary["zeroshot"] <= 1  # of 25 classes
    with Image.open(summary["grid"]) as grid:
        assert grid.format == "PNG"
        assert min(grid.size) > 400
    for name in ("valid_imgs.img_feat.jsonl", "valid_texts.txt_feat.jsonl"):
        assert len((tmp_path / "datasets" / "emoji" / name).read_bytes().splitlines()) == NUM_FEW
    assert "$ cn-clip zeroshot --datapath" in result.stderr
    assert "| INFO |" in result.stderr
    assert "| WARNING |" not in result.stderr


@pytest.mark.long
def test_without_steps_the_demo_measures_the_bundled_model_alone(tmp_path: Path) -> None:
    result = run("cn_clip/demo/main.py", f"--output={tmp_path}", "--steps=0", "--json")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["after"] is None
    assert summary["before"]["text_to_image"]["r10"] > 50
    assert "$ cn-clip train" not in result.stderr
    assert not (tmp_path / "experiments").exists()
    # The line that makes the index runs as it is printed, and the line that serves it names that index.
    install, build, serve = result.stderr.splitlines()[-3:]
    assert install == f"{shlex.quote(sys.executable)} -m pip install 'cn-clip-next[page]'"
    built = subprocess.run(["bash", "-c", build], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    index = open_index(shlex.split(serve)[-1])
    assert (len(index), index.model.name) == (1610, "Emoji-Tiny")
    assert all(one.metadata["caption"] for one in index.search(index.vector(index.ids[0])[None], 3)[0])


def test_the_lines_to_ask_the_model_with_run_as_they_are_printed() -> None:
    printed = EPILOGUE.format(python=shlex.quote(warm_python.program()))
    pasted = printed[printed.index(warm_python.program()) :].replace('load("twemoji")', 'load("twemoji")[:100]')
    assert "[:100]" in pasted
    result = subprocess.run(["bash"], input=pasted, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("'") == 10


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
