"""What a run says of its settings when it begins, and of its recall when it ends."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process_runs import checkpoint, emoji_split, run

from cn_clip.training.advice import Situation, better_settings, fitting_rates, verdict, what_to_try
from cn_clip.training.params import Options
from cn_clip.training.stopping import EarlyStop, Outcome

SMALL = Options(train_data="x", vision_model="RN-Small-64", lr=3e-4, warmup=3, init="Emoji-Tiny")
LARGE = Options(train_data="x", vision_model="ViT-B-16", lr=2e-6, warmup=3, init="ViT-B-16")
FEW = Situation(num_pairs=302, global_batch=32, max_steps=28, is_pretrained=True, moves_statistics=False)
TRIES = ["--lr 1e-4", "more pictures"]

pytestmark = pytest.mark.usefixtures("same_random_state")


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emoji_split(tmp_path_factory.mktemp("split"))


def verdicts(log: str) -> list[str]:
    return re.findall(r"\| (Verdict: .*)", log)


def ends(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [record for record in records if record["kind"] == "end"]


# --- settings


@pytest.mark.parametrize(
    ("options", "situation"),
    [
        (SMALL, FEW),
        (LARGE, FEW),
        (replace(LARGE, use_augment=True, lora_rank=8), FEW),
        (replace(SMALL, lr=5e-4, warmup=0), replace(FEW, is_pretrained=False)),
        (replace(SMALL, lr=1e-5, use_augment=True), replace(FEW, is_pretrained=False)),
    ],
)
def test_settings_that_suit_are_passed_over_in_silence(options: Options, situation: Situation) -> None:
    assert better_settings(options, situation) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (replace(SMALL, lr=1e-5, warmup=50, use_augment=True), "--lr 2e-4, no --use-augment, --warmup 2"),
        (replace(SMALL, lr=1e-2), "--lr 2e-4"),
        (replace(SMALL, warmup=15), "--warmup 2"),
        (replace(LARGE, lr=1e-9), "--lr 3e-6"),
    ],
)
def test_settings_that_do_not_suit_are_answered_with_those_that_do(options: Options, words: str) -> None:
    line = better_settings(options, FEW)
    assert line is not None
    assert f"{options.vision_model} with 302 pairs, a global batch of 32 and 28 steps" in line
    assert f"better trained with {words};" in line


def test_fitting_rates_grow_with_the_batch_and_adapters_bear_more() -> None:
    assert fitting_rates(SMALL, 32) == (1e-4, 3e-4)
    assert fitting_rates(SMALL, 8) == (5e-5, 1.5e-4)
    assert fitting_rates(LARGE, 1024) == (5e-5, 2e-4)
    assert fitting_rates(LARGE, 64) == (5e-5 / 16, 2e-4 / 16)
    assert fitting_rates(replace(LARGE, lora_rank=8), 1024) == pytest.approx((5e-4, 2e-3))


def test_what_to_try_begins_with_the_likeliest_cause() -> None:
    settings = replace(SMALL, lr=1e-5, use_augment=True, warmup=50)
    tries = what_to_try(settings, replace(FEW, moves_statistics=True))
    assert tries[:4] == ["--freeze-bn", "no --use-augment", "--lr 3e-4", "--warmup 2"]
    assert "(302 pairs now)" in tries[-1]
    assert what_to_try(SMALL, FEW)[0] == "--lr 1e-4, or 9e-4"
    scratch = what_to_try(replace(SMALL, init=None, lr=6e-3), replace(FEW, is_pretrained=False))
    assert scratch[0] == "--lr 2e-3"


# --- the verdict


@pytest.mark.parametrize(
    ("outcome", "chinese", "english"),
    [
        (
            Outcome(0.607, 0.7931, 30, 0.7931, 30),
            "结论：平均召回率最高 79.31（第 30 步，epoch_best.pt），第 0 步是 60.70，提高了 18.61",
            "Verdict: best mean recall 79.31 at step 30 (epoch_best.pt), 60.70 at step 0: 18.61 better",
        ),
        (
            Outcome(0.607, 0.7931, 20, 0.75, 30),
            "结论：平均召回率最高 79.31（第 20 步，epoch_best.pt），第 0 步是 60.70，提高了 18.61；结束时 75.00",
            "Verdict: best mean recall 79.31 at step 20 (epoch_best.pt), 60.70 at step 0: 18.61 better; 75.00 at the "
            "end",
        ),
        (
            Outcome(0.607, 0.607, 0, 0.39, 30),
            "结论：训练始终没有让模型变好：平均召回率最高的是第 0 步的 60.70，结束时 39.00。"
            "请继续用原来的权重。可以依次试：--lr 1e-4；more pictures",
            "Verdict: never better than the start: mean recall was best at step 0 (60.70), 39.00 at the end. Keep the "
            "weights you began with. Things to try, in this order: --lr 1e-4; more pictures",
        ),
        (
            Outcome(1.0, 1.0, 0, 1.0, 30),
            "结论：第 0 步的平均召回率已是 100.00，这份验证数据上没有可提高的了；换更多、更难的图片来验证",
            "Verdict: mean recall was 100.00 at step 0 already, so this validation data has nothing left to gain; "
            "validate on more, or harder, pictures",
        ),
        (
            Outcome(None, 0.5, 20, 0.4, 30),
            "结论：平均召回率最高 50.00（第 20 步）；没有第 0 步的验证可比",
            "Verdict: best mean recall 50.00 at step 20; there is no validation at step 0 to compare with",
        ),
    ],
    ids=["better", "fell again", "worse", "perfect", "no start"],
)
def test_the_verdict_is_one_line_in_the_readers_language(
    outcome: Outcome, chinese: str, english: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert verdict(outcome, TRIES) == english
    monkeypatch.setenv("CN_CLIP_LANG", "zh")
    assert verdict(outcome, TRIES) == chinese


def test_a_run_that_validates_ends_with_its_verdict_in_the_log_and_in_the_metrics(split: Path, tmp_path: Path) -> None:
    log = run(split, tmp_path, max_epochs=2, vision_model="RN-Small-64", init="Emoji-Tiny", lr=1e-4)
    (line,) = verdicts(log)
    assert log.splitlines()[-1].endswith(line)
    found = re.fullmatch(
        r"Verdict: best mean recall ([\d.]+) at step (\d) \(epoch_best.pt\), ([\d.]+) at step 0: .*", line
    )
    assert found is not None
    (end,) = ends(tmp_path / "x")
    assert end == {
        **{"step": 6, "kind": "end", "is_better": 1.0, "best_step": int(found[2])},
        "best_mean_recall": pytest.approx(float(found[1]) / 100, abs=1e-4),
        "start_mean_recall": pytest.approx(float(found[3]) / 100, abs=1e-4),
        "mean_recall": end["mean_recall"],
    }
    assert verdicts(run(split, tmp_path, max_epochs=1, val_data=None, name="y")) == []
    assert verdicts(run(split, tmp_path, max_epochs=1, valid_epoch_interval=-1, name="z")) == []


def test_a_run_that_goes_on_compares_with_its_own_start(split: Path, tmp_path: Path) -> None:
    run(split, tmp_path, max_epochs=1)
    start = ends(tmp_path / "x")[0]["start_mean_recall"]
    log = run(split, tmp_path, max_epochs=2)
    assert f"{100 * start:.2f} at step 0" in verdicts(log)[0]
    assert [(end["step"], end["start_mean_recall"]) for end in ends(tmp_path / "x")] == [(6, start)]
    assert len(verdicts(run(split, tmp_path, max_epochs=2))) == 1  # nothing is left to train
    content = checkpoint(tmp_path)
    content["resume"]["early_stop"] = {name: content["resume"]["early_stop"][name] for name in ("best", "bad")}
    torch.save(content, tmp_path / "x" / "checkpoints" / "epoch_latest.pt")
    assert "no validation at step 0" in verdicts(run(split, tmp_path, max_epochs=3))[0]


def test_a_run_that_was_never_better_says_so_and_what_to_try(split: Path, tmp_path: Path) -> None:
    settings = {"vision_model": "RN-Small-64", "init": "Emoji-Tiny", "lr": 0.03, "max_epochs": 1}
    log = run(split, tmp_path, **settings)
    (line,) = verdicts(log)
    assert re.match(
        r"Verdict: never better than the start: mean recall was best at step 0 \([\d.]+\), [\d.]+ at the", line
    )
    assert "Things to try, in this order: --lr 4e-5; --lora-rank 16" in line
    assert not (tmp_path / "x" / "checkpoints" / "epoch_best.pt").exists()
    assert ends(tmp_path / "x")[0]["is_better"] == 0


def test_the_outcome_is_of_all_scores_and_survives_a_restart() -> None:
    stop = EarlyStop()
    assert stop.outcome is None
    for step, score in ((0, 0.4), (3, 0.7), (6, 0.6)):
        stop.observe(score, step)
    again = EarlyStop()
    again.load_state_dict(json.loads(json.dumps(stop.state_dict())))
    assert again.outcome == stop.outcome == Outcome(0.4, 0.7, 3, 0.6, 6)
