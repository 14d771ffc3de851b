"""The flags of training are those of Chinese-CLIP: names, types, choices and defaults, and how old launchers call."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cn_clip import command
from cn_clip.training.main import without_local_rank
from cn_clip.training.params import Options

ROOT = Path(__file__).resolve().parents[1]


class Flag(NamedTuple):
    """One flag of cn_clip 1.6.0: what is written behind it, what is read, what it is when not given."""

    name: str
    written: tuple[str, ...]
    read: tuple[Any, ...]
    default: Any


def text(name: str, default: str | None, *choices: str) -> Flag:
    return Flag(name, choices or ("a name",), choices or ("a name",), default)


def number(name: str, default: float | None, *values: float) -> Flag:
    return Flag(name, tuple(str(value) for value in values), values, default)


def switch(name: str) -> Flag:
    return Flag(name, ("",), (True,), False)


VISION = ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14", "RN50")
TEXT = ("RoBERTa-wwm-ext-base-chinese", "RoBERTa-wwm-ext-large-chinese", "RBT3-chinese")

FLAGS = [
    text("--val-data", None),
    number("--num-workers", 4, 0, 8),
    number("--valid-num-workers", 1, 0, 2),
    text("--logs", "./logs/"),
    text("--name", "train_clip"),
    number("--log-interval", 10, 1),
    switch("--report-training-batch-acc"),
    number("--batch-size", 64, 128),
    number("--valid-batch-size", 64, 128),
    number("--max-steps", None, 735),
    number("--max-epochs", 32, 3),
    number("--valid-step-interval", None, 150, -1),
    number("--valid-epoch-interval", 1, 2, -1),
    number("--context-length", 52, 24),
    number("--lr", None, 5e-5),
    number("--beta1", None, 0.8),
    number("--beta2", None, 0.95),
    number("--eps", None, 1e-7),
    number("--wd", 0.2, 0.001),
    number("--warmup", 500, 0, 100),
    switch("--use-bn-sync"),
    switch("--use-augment"),
    switch("--skip-scheduler"),
    number("--save-epoch-frequency", 1, 2, -1),
    number("--save-step-frequency", -1, 999999),
    text("--resume", None),
    switch("--reset-optimizer"),
    switch("--reset-data-offset"),
    text("--precision", "amp", "amp", "fp16", "fp32"),
    text("--vision-model", "ViT-B-16", *VISION),
    number("--mask-ratio", 0, 0.0, 0.5),
    text("--clip-weight-path", None),
    switch("--freeze-vision"),
    text("--text-model", "RoBERTa-wwm-ext-base-chinese", *TEXT),
    text("--bert-weight-path", None),
    switch("--grad-checkpointing"),
    switch("--use-flash-attention"),
    number("--accum-freq", 1, 4),
    switch("--gather-with-grad"),
    switch("--skip-aggregate"),
    switch("--debug"),
    number("--seed", 123, 7),
    switch("--distillation"),
    text("--teacher-model-name", None),
    number("--kd_loss_weight", 0.5, 0.25),
]
# What a flag of the list asks for besides itself.
TOGETHER = {"--distillation": ["--teacher-model-name", "teacher.pt"]}


def parse(*args: str) -> Options:
    return command.parse(Options, ["--train-data", "lmdb/train", *args])


def field(flag: Flag) -> str:
    return flag.name.removeprefix("--").replace("-", "_")


def by_name(flag: Flag) -> str:
    return flag.name


def test_every_flag_of_the_original_is_in_the_list_once() -> None:
    assert len({flag.name for flag in FLAGS}) == len(FLAGS) == 45


def test_the_flags_of_the_original_come_first_in_its_order() -> None:
    names = [one.name for one in fields(Options)]
    assert names[: len(FLAGS) + 1] == ["train_data", *map(field, FLAGS)]


def test_the_training_data_is_required() -> None:
    done = subprocess.run(
        [sys.executable, "cn_clip/training/main.py"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "--train-data" in done.stderr


@pytest.mark.parametrize("flag", FLAGS, ids=by_name)
def test_the_default_is_that_of_the_original(flag: Flag) -> None:
    assert getattr(parse(), field(flag)) == flag.default


@pytest.mark.parametrize("flag", FLAGS, ids=by_name)
def test_the_flag_is_read_in_every_spelling(flag: Flag) -> None:
    for written, expected in zip(flag.written, flag.read, strict=True):
        for name in {flag.name, "--" + field(flag), "--" + field(flag).replace("_", "-")}:
            spellings = [[name]] if expected is True else [[name, written], [f"{name}={written}"]]
            for words in spellings:
                value = getattr(parse(*words, *TOGETHER.get(flag.name, [])), field(flag))
                assert (value, type(value)) == (expected, type(expected)), words


@pytest.mark.parametrize("flag", [flag for flag in FLAGS if flag.default is None], ids=by_name)
def test_none_may_be_written_out(flag: Flag) -> None:
    assert getattr(parse(f"{flag.name}=None"), field(flag)) is None


# The original's defaults by picture tower.
@pytest.mark.parametrize(
    ("vision", "settings"),
    [
        *((name, (5.0e-4, 0.9, 0.98, 1.0e-6)) for name in ("ViT-B-32", "ViT-B-16", "ViT-H-14")),
        *((name, (4.0e-4, 0.9, 0.98, 1.0e-6)) for name in ("ViT-L-14", "ViT-L-14-336")),
        ("RN50", (5.0e-4, 0.9, 0.999, 1.0e-8)),
    ],
)
def test_the_optimizer_is_set_by_the_picture_tower_where_nothing_is_given(
    vision: str, settings: tuple[float, ...]
) -> None:
    options = parse("--vision-model", vision)
    assert tuple(options.optimizer_setting(name) for name in ("lr", "beta1", "beta2", "eps")) == settings
    assert parse("--vision-model", vision, "--eps", "0.5").optimizer_setting("eps") == 0.5


@pytest.mark.parametrize("words", [["--local_rank=3"], ["--local-rank=3"], ["--local_rank", "3"]])
def test_the_rank_of_old_launchers_is_taken_with_one_warning(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    kept = without_local_rank(["--train-data=x", *words, "--lr", "1e-5"])
    assert kept == ["--train-data=x", "--lr", "1e-5"]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(words[0])
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("words", [["--no-such-flag"], ["--vision-model", "ViT-B-17"], ["--batch-size", "many"]])
def test_what_the_original_refuses_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(*words)
    assert stopped.value.code == 2
    assert words[0] in capsys.readouterr().err
