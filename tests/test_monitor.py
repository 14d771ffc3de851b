"""What a run keeps for its trainer: metrics without doubles, a plot, events, and warnings worked by hand."""

import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cn_clip.errors import CnClipError, MissingExtraError
from cn_clip.training import curves, monitor
from cn_clip.training.log_lines import StuckLoss, peak_memory, rate_warning
from cn_clip.training.monitor import Monitor
from cn_clip.training.stopping import EarlyStop

pytestmark = pytest.mark.usefixtures("drawn")

RECALLS = {
    f"{way}_{name}": value
    for way in ("text_to_image", "image_to_text")
    for name, value in {"r1": 0.2, "r5": 0.5, "r10": 0.6, "mean_recall": 0.43}.items()
}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def steps(folder: Path, kind: str) -> list[int]:
    return [line["step"] for line in lines(folder) if line["kind"] == kind]


def train(folder: Path, first: int, last: int, *, loss: float = 2.0, validates: bool = False) -> Monitor:
    """A run from step `first` to `last`, and where asked a validation there."""
    with Monitor(folder, start_step=first - 1, tensorboard=False) as run:
        for step in range(first, last + 1):
            run.step(step, {"loss": loss, "lr": 1e-4})
        if validates:
            run.validation(last, {"loss": 5.0, **RECALLS})
    return run


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Counts the drawings instead of making them."""
    drawn: list[Path] = []
    monkeypatch.setattr(curves, "draw", lambda series, path, title: drawn.append(path))
    return drawn


def test_each_call_is_one_line_that_is_there_at_once(tmp_path: Path, undrawn: list[Path]) -> None:
    with Monitor(tmp_path, start_step=0, tensorboard=False) as run:
        run.validation(0, {"loss": 4.5})
        run.step(1, {"loss": 4.0, "lr": 1e-4})
        assert lines(tmp_path) == [
            {"step": 0, "kind": "valid", "loss": 4.5},
            {"step": 1, "kind": "train", "loss": 4.0, "lr": 1e-4},
        ]


def test_numbers_that_are_not_finite_become_null(tmp_path: Path, undrawn: list[Path]) -> None:
    with Monitor(tmp_path, start_step=0, tensorboard=False) as run:
        run.step(1, {"loss": math.nan, "scale": math.inf, "lr": 0.5})
    assert lines(tmp_path) == [{"step": 1, "kind": "train", "loss": None, "scale": None, "lr": 0.5}]


def test_a_run_that_resumes_earlier_leaves_no_second_version(tmp_path: Path, undrawn: list[Path]) -> None:
    train(tmp_path, 1, 10, loss=9.0)
    train(tmp_path, 7, 12, loss=1.0)
    assert steps(tmp_path, "train") == list(range(1, 13))
    assert [line["loss"] for line in lines(tmp_path)] == [9.0] * 6 + [1.0] * 6


def test_a_run_from_the_beginning_sets_the_numbers_of_an_earlier_one_aside(tmp_path: Path, undrawn: list[Path]) -> None:
    train(tmp_path, 1, 3, validates=True)
    with Monitor(tmp_path, start_step=0, tensorboard=False) as run:
        run.validation(0, {"loss": 4.0})
    assert lines(tmp_path) == [{"step": 0, "kind": "valid", "loss": 4.0}]
    (aside,) = tmp_path.glob("metrics_????-??-??-??-??-??.jsonl")
    assert [json.loads(line)["step"] for line in aside.read_text(encoding="utf-8").splitlines()] == [1, 2, 3, 3]


def test_a_validation_done_again_replaces_the_earlier_one(tmp_path: Path, undrawn: list[Path]) -> None:
    train(tmp_path, 1, 4, validates=True)
    with Monitor(tmp_path, start_step=4, tensorboard=False) as run:
        run.validation(4, {"loss": 4.0})
        run.step(5, {"loss": 1.0})
    assert steps(tmp_path, "train") == [1, 2, 3, 4, 5]
    assert [line["loss"] for line in lines(tmp_path) if line["kind"] == "valid"] == [4.0]


TORN = ['{"step": 4, "kind": "tr', "\0\0\0\0", '{"step": 4}\n', "[1]\n", '"']
TORN += ['{"step": 4, "kind": "train", "loss": "x"}\n']


@pytest.mark.parametrize("torn", TORN)
def test_a_torn_line_is_left_out_and_said(
    torn: str, tmp_path: Path, undrawn: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path, 1, 3)
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as stream:
        stream.write(torn)
    train(tmp_path, 4, 5)
    assert steps(tmp_path, "train") == [1, 2, 3, 4, 5]
    assert "left out 1 lines that are no record" in caplog.text


def test_the_file_is_rewritten_whole_or_not_at_all(
    tmp_path: Path, undrawn: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path, 1, 6)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def no_room(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_room)
    with pytest.raises(CnClipError, match=r"metrics\.jsonl: cannot be written \(No space left on device\)"):
        Monitor(tmp_path, start_step=3, tensorboard=False)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which Linux has")
def test_a_full_disk_is_told_with_the_file(tmp_path: Path, undrawn: list[Path]) -> None:
    run = Monitor(tmp_path, start_step=0, tensorboard=False)
    run._close_file()
    run._stream = open("/dev/full", "w")  # noqa: SIM115 - closed by the monitor
    for leave in (lambda: run.step(1, {"loss": 1.0}), run.close):
        with pytest.raises(CnClipError, match=r"metrics\.jsonl: cannot be written \(No space left on device\)"):
            leave()


@pytest.mark.parametrize("steps_after", [0, 1])
def test_curves_are_drawn_at_every_validation_and_at_the_end_if_there_is_more(
    tmp_path: Path, undrawn: list[Path], steps_after: int
) -> None:
    run = Monitor(tmp_path, start_step=0, tensorboard=False)
    run.validation(0, {"loss": 4.5})
    run.step(1, {"loss": 4.0})
    run.validation(1, {"loss": 4.4})
    for _ in range(steps_after):
        run.step(2, {"loss": 3.9})
    run.close()
    run.close()
    assert undrawn == [tmp_path / "curves.png"] * (2 + steps_after)


def test_a_picture_that_could_not_be_written_is_drawn_again_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: list[OSError | None] = [OSError(28, "No space left on device"), None]

    def draw(*_: object, **__: object) -> None:
        if (outcome := outcomes.pop(0)) is not None:
            raise outcome

    monkeypatch.setattr(curves, "draw", draw)
    run = Monitor(tmp_path, start_step=0, tensorboard=False)
    run.validation(0, {"loss": 4.5})
    run.close()
    assert outcomes == []


def test_a_resumed_run_draws_what_came_before_too(tmp_path: Path, undrawn: list[Path]) -> None:
    train(tmp_path, 1, 4, validates=True)
    run = train(tmp_path, 3, 5, loss=1.0)
    drawn = monitor.all_points(run._records)
    drawn_steps, losses = drawn["train/loss"]
    assert (drawn_steps.tolist(), losses.tolist()) == ([1, 2, 3, 4, 5], [2, 2, 1, 1, 1])
    assert "valid/loss" not in drawn  # step 4 is done again


def test_the_picture_shows_loss_recall_and_rate(tmp_path: Path) -> None:
    rest = {"lr": 1e-4, "chance_loss": math.log(64), "unknown": 7.0}
    records = [{"step": step, "kind": "train", "loss": 4 - step / 10, **rest} for step in range(1, 30)]
    records += [{"step": step, "kind": "valid", "loss": loss, **RECALLS} for step, loss in ((0, 4.0), (29, 2.0))]
    from matplotlib.figure import Figure

    figure = Figure()
    curves.fill(figure, monitor.all_points(records))
    loss, text_to_image, image_to_text, rate = figure.axes
    labels = [[line.get_label() for line in panel.get_lines()] for panel in figure.axes]
    assert labels[0][1:] == ["train, smoothed", "valid", "ln(batch): guessing"]
    assert labels[1] == labels[2] == ["R@1", "R@5", "R@10", "mean"]
    assert len(labels[3]) == 1
    assert text_to_image.get_lines()[0].get_ydata().tolist() == [20.0, 20.0]
    assert loss.get_lines()[3].get_ydata()[0] == pytest.approx(4.1589, abs=1e-4)
    assert [panel.get_title().split(" (")[0] for panel in (text_to_image, image_to_text, rate)] == [
        "recall text → image",
        "recall image → text",
        "learning rate",
    ]


@pytest.mark.parametrize("name", ["emoji", "实验一", "cost $5 and $6"])
def test_any_name_of_a_run_and_any_amount_of_numbers_can_be_drawn(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    with Monitor(folder, start_step=0, tensorboard=False) as run:
        run.validation(0, {"loss": 4.0, **RECALLS})
        assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in folder.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_a_run_without_any_number_still_closes(tmp_path: Path) -> None:
    Monitor(tmp_path, start_step=0, tensorboard=False).close()
    assert (tmp_path / "curves.png").is_file()


def test_smoothing_is_a_mean_over_nine_points_and_fewer_at_the_ends() -> None:
    values = np.arange(12, dtype=np.float64) ** 2
    means = monitor.smoothed(values)
    assert means[0] == (0 + 1 + 4 + 9 + 16) / 5
    assert means[5] == pytest.approx(sum(value**2 for value in range(1, 10)) / 9)
    assert len(monitor.smoothed(np.array([]))) == 0


def test_without_matplotlib_one_line_says_how_to_get_it_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with caplog.at_level(logging.INFO, logger="cn_clip"), Monitor(tmp_path, start_step=0, tensorboard=False) as run:
        run.validation(0, {"loss": 4.0})
        run.validation(1, {"loss": 4.0})
    (message,) = [record for record in caplog.records if "pip install 'cn-clip-next[plot]'" in record.getMessage()]
    assert message.levelno == logging.INFO
    assert steps(tmp_path, "valid") == [0, 1]


def test_a_plot_that_cannot_be_written_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_room(series: object, path: Path, title: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(curves, "draw", no_room)
    with Monitor(tmp_path, start_step=0, tensorboard=False) as run:
        run.validation(0, {"loss": 4.0})
    assert "curves.png: cannot be written (No space left on device)" in caplog.text


def test_events_hold_the_numbers_and_hide_those_of_steps_done_again(tmp_path: Path, undrawn: list[Path]) -> None:
    event_files = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, loss in ((0, 9.0), (2, 1.0)):
        with Monitor(tmp_path, start_step=start, tensorboard=True) as run:
            for step in range(start + 1, start + 5):
                run.step(step, {"loss": loss})
            run.validation(start + 4, {"loss": 0.5})
    events = event_files.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(one.step, one.value) for one in events.Scalars("train/loss")] == [
        *((step, 9.0) for step in (1, 2)),
        *((step, 1.0) for step in (3, 4, 5, 6)),
    ]
    assert [one.step for one in events.Scalars("valid/loss")] == [6]


def test_without_tensorboard_the_install_command_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(MissingExtraError, match=r"--report-to tensorboard needs .*'cn-clip-next\[tensorboard\]'"):
        Monitor(tmp_path, start_step=0, tensorboard=True)
    assert list(tmp_path.iterdir()) == []


def test_peak_memory_is_that_of_this_process_in_bytes() -> None:
    code = (
        "from cn_clip.training.log_lines import peak_memory\n"
        "before = peak_memory('cpu'); data = bytearray(b'x') * (60 << 20); del data\n"
        "print(before, peak_memory('cpu'))"
    )
    burden = bytearray(b"x") * (900 << 20)  # the child must not report its parent's memory
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    del burden
    before, after = (int(word) / (1 << 20) for word in done.stdout.split())
    assert 50 < before < 900
    assert after >= before + 50
    assert peak_memory("cpu") > (900 << 20)


def stuck(loss: float, *, batch: int = 64, count: int = 500, warmup: int = 100) -> list[int]:
    """The steps at which a constant loss is warned of."""
    watch = StuckLoss(warmup=warmup)
    return [step for step in range(1, count + 1) if watch.observe(step, loss, batch)]


def test_a_loss_at_ln_of_the_batch_is_warned_of_once_after_200_steps() -> None:
    assert stuck(math.log(64)) == [300]
    assert stuck(math.log(64) + 0.04) == [300]


@pytest.mark.parametrize("loss", [math.log(64) - 0.06, math.log(64) + 0.06, 0.0, math.nan, math.inf])
def test_any_other_loss_is_not_warned_of(loss: float) -> None:
    assert stuck(loss) == []


def test_a_batch_of_one_has_nothing_to_guess() -> None:
    assert stuck(0.0, batch=1) == []


def test_a_loss_that_leaves_and_comes_back_is_counted_anew() -> None:
    watch = StuckLoss(warmup=0)
    losses = [math.log(8)] * 150 + [1.0] * 50 + [math.log(8)] * 450
    (warned,) = [step for step, loss in enumerate(losses, start=1) if watch.observe(step, loss, 8)]
    assert warned > 200 + 200


def test_noise_around_ln_of_the_batch_is_smoothed_away() -> None:
    watch = StuckLoss(warmup=0)
    noisy = (math.log(16) + (0.3 if step % 2 else -0.3) for step in range(1, 400))
    assert any(watch.observe(step, loss, 16) for step, loss in enumerate(noisy, start=1))


def test_the_warning_says_what_it_means_and_what_to_do() -> None:
    watch = StuckLoss(warmup=0, patience=1)
    message = watch.observe(7, math.log(64), 64)
    assert message is not None
    for words in ("stayed at 4.159", "ln(64) = 4.159", "step 7", "--lr", "--warmup", "cn-clip dataset check"):
        assert words in message


# The published rate, 5e-5 at 1024 pairs, in proportion; four times as much is borne.
@pytest.mark.parametrize(
    ("lr", "batch", "is_warned"),
    [(5e-5, 1024, False), (2e-4, 1024, False), (2.1e-4, 1024, True), (5e-5, 64, True), (1.2e-5, 64, False)],
)
def test_a_fine_tuning_rate_is_judged_in_proportion_to_the_batch(lr: float, batch: int, is_warned: bool) -> None:
    assert (rate_warning(lr, batch, pretrained=True) is not None) == is_warned


def test_the_rate_warning_tells_the_numbers_and_a_rate_to_take() -> None:
    message = rate_warning(5e-5, 64, pretrained=True)
    assert message is not None
    for words in ("--lr 5e-05 is 16 times", "global batch of 64", "3.1e-06 here", "try --lr 3e-06 to 1e-05", "1024"):
        assert words in message


@pytest.mark.parametrize(("lr", "is_warned"), [(5e-4, False), (5e-3, False), (6e-3, True), (0.1, True)])
def test_from_scratch_only_absurd_rates_are_warned_of(lr: float, is_warned: bool) -> None:
    assert (rate_warning(lr, 8, pretrained=False) is not None) == is_warned


def test_early_stop_counts_scores_in_a_row_that_are_not_better() -> None:
    stop = EarlyStop()
    seen = [(stop.observe(score), stop.bad, stop.should_stop(2)) for score in (0.3, 0.4, 0.4, 0.5, 0.1, math.nan)]
    assert seen == [
        (True, 0, False),
        (True, 0, False),
        (False, 1, False),
        (True, 0, False),
        (False, 1, False),
        (False, 2, True),
    ]
    assert stop.best == 0.5
    assert not stop.should_stop(None)


def test_early_stop_goes_on_from_its_state() -> None:
    first = EarlyStop()
    first.observe(0.7)
    first.observe(0.6)
    second = EarlyStop()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert (second.best, second.bad, second.observe(0.65), second.should_stop(2)) == (0.7, 1, False, True)
