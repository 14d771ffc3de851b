"""What people see while they wait: a line on a terminal, and nothing of it anywhere else."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cn_clip import progress

if sys.platform == "win32":
    pytest.skip("terminals are made by the module pty, which Windows lacks", allow_module_level=True)

from dataset_files import jsonl_line, tsv_line, write_split
from terminals import ROOT, on_terminal, python

HEAD = "import sys, time, os\nfrom cn_clip.progress import *\n"
COUNTING = HEAD + (
    "with progress(30, 'pictures', 'encoding') as bar:\n"
    "    for number in range(30):\n"
    "        time.sleep(0.05)\n"
    "        bar.advance()\n"
    "        if number == 20: print('a line')\n"
)


def test_a_bar_shows_share_count_time_left_and_speed_and_stays_when_it_is_full() -> None:
    seen = on_terminal(python(COUNTING))
    pattern = r"encoding  \d\d%\|[^|]+\| \d\d/30 \[00:0\d<00:0\d, [\d.]+ pictures/s\]"
    assert any(re.fullmatch(pattern, line) for line in seen.lines), seen.lines
    first, last = seen.screen.split("\n")
    assert first == "a line"
    assert re.match(r"encoding 100%\|█+\| 30/30 \[", last)
    assert "\x1b" not in seen.text


def test_nothing_is_drawn_in_a_pipe() -> None:
    done = subprocess.run(python(COUNTING), capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("a line\n", "")


def test_a_bar_is_on_standard_error_when_standard_output_is_a_pipe() -> None:
    seen = on_terminal(python(COUNTING), stdout="pipe")
    assert seen.stdout == "a line\n"
    assert "encoding 100%" in seen.screen


@pytest.mark.parametrize("columns", [20, 40, 59, 60])
def test_a_line_fits_the_terminal(columns: int) -> None:
    code = COUNTING.replace("encoding", "编码图片 encoding")
    seen = on_terminal(python(code), columns=columns)
    drawn = [line for line in seen.lines if "编码" in line]
    assert drawn
    assert all(progress.cells_of(line) < columns for line in drawn)
    assert all("\n" not in part for part in seen.text.split("a line")[0].split("\r") if "编码" in part)


def test_work_without_a_count_shows_its_time_after_a_moment_and_leaves_nothing() -> None:
    code = HEAD + "with working('loading weights'):\n    time.sleep(3.2)\nprint('done')"
    seen = on_terminal(python(code))
    assert [line for line in seen.lines if "00:02" in line] == ["loading weights… [00:02]"]
    assert seen.screen == "done"


def test_a_line_goes_on_while_one_batch_takes_long() -> None:
    code = HEAD + "with progress(2, 'steps', 'training') as bar:\n    bar.advance(); time.sleep(3)"
    seen = on_terminal(python(code))
    assert {"00:01", "00:02"} <= set(re.findall(r"\[(\d\d:\d\d)<", seen.text))


def test_what_is_printed_word_by_word_is_not_drawn_over() -> None:
    code = HEAD + "with working('waiting'):\n    print('a', end='', flush=True); time.sleep(2); print('b')"
    assert on_terminal(python(code)).screen == "ab"


# A run in the background of a shell is born deaf to Ctrl-C, and so are its children.
OBEYS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"


@pytest.mark.parametrize(
    ("end", "status", "left"),
    [
        ("sys.exit('error: x')", 1, "error: x"),
        ("sys.stdout.flush(); put_away(); print('bye', flush=True); os._exit(3)", 3, "bye"),
        (f"{OBEYS}; os.kill(os.getpid(), 2); time.sleep(60)", -2, "KeyboardInterrupt"),
    ],
)
def test_an_end_in_the_middle_leaves_no_half_drawn_line(end: str, status: int, left: str) -> None:
    code = HEAD + f"with progress(9, 'steps', 'training') as bar:\n    bar.advance()\n    time.sleep(1.2)\n    {end}"
    seen = on_terminal(python(code))
    assert "training" in seen.text
    assert "training" not in seen.screen.replace(code, "").split("Traceback")[0]
    assert seen.screen.endswith(left)
    assert seen.status == status


def test_the_innermost_step_that_lasts_is_shown() -> None:
    code = HEAD + (
        "with progress(4, 'epochs', 'outer') as outer:\n"
        "    for _ in range(2):\n"
        "        with progress(9, 'steps', 'inner') as bar: time.sleep(1)\n"
        "        with working('short'): time.sleep(0.1)\n"
        "        outer.advance(2)\n"
        "    time.sleep(0.6)\n"
    )
    seen = on_terminal(python(code))
    assert any(line.startswith("inner") for line in seen.lines)
    assert not any(line.startswith("short") for line in seen.lines)
    assert seen.screen.startswith("outer 100%")
    assert "inner" not in seen.screen


def test_a_child_made_by_fork_draws_nothing_and_may_print() -> None:
    code = HEAD + (
        "with progress(9, 'steps', 'training') as bar:\n"
        "    for _ in range(20):\n"
        "        child = os.fork()\n"
        "        if not child:\n"
        "            with progress(2, 'files', 'child'): print('from the child', flush=True)\n"
        "            os._exit(0)\n"
        "        time.sleep(0.05); os.waitpid(child, 0)\n"
        "    time.sleep(1)\n"
        "    bar.advance(9)\n"
    )
    seen = on_terminal(python(code), timeout=30)
    assert seen.status == 0
    assert seen.text.count("from the child") == 20
    assert not any(line.startswith("child") for line in seen.lines)
    assert "training 100%" in seen.screen


def test_hidden_steps_are_not_drawn() -> None:
    code = "from cn_clip.progress import hidden\nwith hidden():\n    " + COUNTING.replace("\n", "\n    ")
    assert on_terminal(python(code)).text == "a line\r\n"


def test_other_processes_of_torchrun_draw_nothing() -> None:
    assert on_terminal(python(COUNTING), env={"RANK": "1"}).text == "a line\r\n"


def test_a_terminal_that_cannot_draw_over_gets_lines() -> None:
    code = HEAD + "with progress(2, 'steps', 'training') as bar:\n    bar.advance(); time.sleep(3.2)"
    seen = on_terminal(python(code), env={"TERM": "dumb"})
    assert re.fullmatch(r"training  50% 1/2 \[00:02<00:02\]\r\n", seen.text)


def test_a_wait_for_others_is_no_work_but_steps_in_it_are() -> None:
    code = HEAD + (
        "with working('serving'), resting():\n"
        "    time.sleep(2.2)\n"
        "    with progress(2, 'items', 'updating') as bar: time.sleep(1)\n"
    )
    seen = on_terminal(python(code))
    assert "serving" not in seen.text
    assert "updating" in seen.text


def test_a_terminal_that_goes_away_does_not_end_the_work(tmp_path: Any) -> None:
    import pty

    ours, theirs = pty.openpty()
    kept = tmp_path / "done"
    code = COUNTING.replace("print('a line')", "pass") + f"open({str(kept)!r}, 'w').close()"
    process = subprocess.Popen(python(code), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    time.sleep(0.1)
    os.close(ours)
    process.wait(30)
    assert kept.exists()


def test_counting_costs_an_addition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.Step, "line", lambda *_, **__: pytest.fail("drawn while it was counted"))
    with progress.progress(1000, "items", "counting") as bar:
        for _ in range(1000):
            bar.advance()
    assert bar.num_done == 1000


def test_signals_find_their_handlers_while_a_line_is_drawn() -> None:
    code = HEAD + (
        "from cn_clip.stopping import StopRequest\n"
        "stop = StopRequest()\n"
        "with stop.noted(), progress(400, 'steps', 'training') as bar:\n"
        "    print('ready', flush=True)\n"
        "    for _ in stop.until(iter(lambda: time.sleep(0.01), 1)): bar.advance()\n"
        "print('stopped by', stop.number)\n"
    )
    process = subprocess.Popen(python(code), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "stopped by 15\n"


# --- the commands

# In one process, as importing PyTorch takes longer than all of them; every step is long enough to be shown.
RUNS = """
import sys
from pathlib import Path
from cn_clip import cli, progress
from cn_clip.demo import emoji
progress.DELAY, progress.QUIET, progress.TICK, more = 0.0, 0.0, 0.005, sys.argv[1:]
TINY = ["--vision-model=ViT-Tiny-64", "--text-model=BERT-Tiny-chinese", "--device=cpu", "--precision=fp32"]
SIDES = ["--image-data=data/lmdb/valid/imgs", "--text-data=data/valid_texts.jsonl"]
TRAIN = ["--train-data=data/lmdb/valid", "--val-data=data/lmdb/valid", "--logs=logs", "--max-steps=2", *TINY]
for title, words in {
    "dataset from-folder": ["--folder=pictures", "--output=made"],
    "dataset build": ["--data_dir=data", "--splits=valid"],
    "dataset shards": ["--data_dir=data", "--split=valid", "--output=shards"],
    "features": ["--extract-image-feats", "--extract-text-feats", "--resume=Emoji-Tiny", *SIDES,
                 "--image-feat-output-path=i.jsonl", "--text-feat-output-path=t.jsonl"],
    "topk": ["--image-feats=i.jsonl", "--text-feats=t.jsonl", "--output=p.jsonl"],
    "zeroshot": ["--datapath=classes", "--label-file=labels.txt", "--resume=Emoji-Tiny"],
    "linear-probe": ["--train=classes", "--test=classes", "--model=Emoji-Tiny"],
    "index build": ["pictures", "--output=photos.index", "--model=Emoji-Tiny"],
    "search": ["photos.index", "红色的花"],
    "checkpoint average": ["a.pt", "b.pt", "--output=mean.pt"],
    "wise-ft": ["--zeroshot=a.pt", "--finetuned=b.pt", "--val-data=data/lmdb/valid", "--output=mixed.pt"],
    "train": [*TRAIN, "--batch-size=8", "--valid-batch-size=8", "--num-workers=0", "--valid-num-workers=0"],
}.items():
    if more and title == "train":  # which has no --json
        continue
    print("==", title, flush=True)
    try:
        cli.main([*title.split(), *words, *more])
    except SystemExit as end:
        print("ended with", end.code, flush=True)
"""
LEFT = {
    "dataset from-folder": ["reading pictures"],
    "dataset build": ["valid pictures 12 records", "valid texts 12 records"],
    "dataset shards": ["writing shards 100%"],
    "features": ["encoding texts 100%", "encoding pictures 100%"],
    "topk": ["reading i.jsonl 100%", "reading t.jsonl 100%", "searching 100%"],
    "zeroshot": ["classifying 100%"],
    "linear-probe": ["choosing C"],
    "index build": ["indexing 100%"],
    "search": [],
    "checkpoint average": ["averaging 100%"],
    "wise-ft": ["encoding pictures 100%"],
    "train": ["training 100%"],
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with twelve pictures as what the commands take."""
    from cn_clip import emoji_pack
    from cn_clip.clip.loading import open_model
    from cn_clip.clip.weights.checkpoint import Checkpoint
    from cn_clip.clip.weights.writing import write_checkpoint

    folder = tmp_path_factory.mktemp("work")
    packed = emoji_pack.load()[:12]
    for number, one in enumerate(packed):
        for path in (folder / "pictures" / f"{one.name}.webp", folder / "classes" / str(number % 2) / f"{number}.webp"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(one.picture)
    (folder / "labels.txt").write_text("".join(f"{one.name}\n" for one in packed[:2]), encoding="utf-8")
    images = (tsv_line(number, one.picture) for number, one in enumerate(packed))
    texts = (jsonl_line(number, one.name, [number]) for number, one in enumerate(packed))
    write_split(folder / "data", images, texts, split="valid")
    model, _ = open_model("Emoji-Tiny")
    for name in ("a.pt", "b.pt"):
        write_checkpoint(folder / name, model.state_dict(), Checkpoint(folder / name, {}))
    return folder


def in_folder(work: Path, tmp_path: Path, *more: str) -> tuple[Path, list[str]]:
    folder = tmp_path / "work"
    shutil.copytree(work, folder)
    return folder, [sys.executable, "-c", RUNS, *more]


def test_every_command_shows_how_far_it_is(work: Path, tmp_path: Path) -> None:
    folder, command = in_folder(work, tmp_path)
    seen = on_terminal(command, cwd=folder, columns=120)
    assert seen.status == 0, seen.screen
    parts = dict(part.split("\n", 1) for part in seen.screen.split("== ")[1:])
    assert parts.keys() == LEFT.keys()
    for title, lines in LEFT.items():
        for line in lines:
            assert line in parts[title], (title, parts[title])
    assert "ended with" not in seen.screen
    assert "validating" in seen.text
    assert "loading weights" in seen.text
    assert "\x1b" not in seen.text


@pytest.mark.parametrize("more", [[], pytest.param(["--json"], marks=pytest.mark.long)])
def test_a_pipe_gets_nothing_of_it(work: Path, tmp_path: Path, more: list[str]) -> None:
    folder, command = in_folder(work, tmp_path, *more)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ended with" not in done.stdout
    for text in (done.stdout, done.stderr):
        assert not {"\r", "\x1b", "…"} & set(text)
        assert "100%" not in text.replace("(100%)", "")


def test_json_on_a_terminal_is_all_that_comes(work: Path, tmp_path: Path) -> None:
    folder, command = in_folder(work, tmp_path, "--json")
    seen = on_terminal(command, cwd=folder, stdout="pipe")
    assert seen.status == 0, seen.text
    assert "\r" not in seen.text.replace("\r\n", "\n")
