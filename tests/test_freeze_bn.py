"""The running statistics of batch normalisation in fine-tuning: kept with --init, else moved as in Chinese-CLIP."""

from pathlib import Path
from typing import Any

import pytest
import torch
from in_process_runs import build, checkpoint, emoji_split, options, run

from cn_clip.clip.model import CLIP
from cn_clip.clip.transforms import normalised
from cn_clip.clip.weights.checkpoint import read_checkpoint
from cn_clip.errors import ConfigError
from cn_clip.settings import broken
from cn_clip.training import adapt
from cn_clip.training.params import RULES
from cn_clip.training.trainer import Trainer
from cn_clip.zoo import model_config

TOWERS: dict[str, Any] = {"vision_model": "RN-Small-64", "text_model": "BERT-Tiny-chinese"}
GIVEN: dict[str, Any] = {**TOWERS, "init": "Emoji-Tiny"}
# As Chinese-CLIP's guides begin a fine-tuning.
AS_THERE: dict[str, Any] = {**TOWERS, "resume": "Emoji-Tiny", "reset_optimizer": True, "reset_data_offset": True}
KEPT = "The running statistics of batch normalisation are kept as they are (--freeze-bn)."
MOVE = "The running statistics of batch normalisation follow the training batches, as in Chinese-CLIP"

pytestmark = pytest.mark.usefixtures("same_random_state")


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emoji_split(tmp_path_factory.mktemp("split"))


def statistics(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in tensors.items() if "running_" in name or "num_batches" in name}


def changed_by_an_update(trainer: Trainer) -> set[str]:
    """The names of the tensors that one update moves."""
    before = {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}
    trainer._set_training_mode()
    trainer._step(0, next(trainer._updates(0)))
    return {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}


def with_statistics(changed: set[str]) -> bool:
    moved = {name for name in changed if "running_" in name}
    assert moved in (set(), {name for name in moved if name.startswith("visual.")})
    return bool(moved)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Those on the statistics."""
    said = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    return [line for line in said if "batch normalisation" in line or "statistics" in line]


def random_weights(path: Path) -> str:
    torch.manual_seed(0)
    torch.save({"state_dict": CLIP.from_config(model_config(*TOWERS.values())).state_dict()}, path)
    return str(path)


@pytest.mark.parametrize("batches", [{}, {"batch_size": 2, "accum_freq": 2}], ids=["one", "joined"])
def test_a_run_from_given_weights_keeps_the_statistics_and_trains_scale_and_shift(
    batches: dict[str, Any], split: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "cn_clip"):
        trainer = build(split, tmp_path, **GIVEN, **batches)
    assert caplog.messages.count(KEPT) == 1
    changed = changed_by_an_update(trainer)
    assert not with_statistics(changed)
    assert {f"visual.bn1.{name}" for name in ("weight", "bias")} <= changed
    assert not any("num_batches_tracked" in name for name in changed)


def test_the_kept_statistics_are_in_every_file_of_the_run_and_normalise_its_batches(
    split: Path, tmp_path: Path
) -> None:
    log = run(split, tmp_path, **GIVEN, max_epochs=2, lr=1e-12)
    before = statistics(read_checkpoint("cn_clip/clip/bundled/emoji_tiny.safetensors").state_dict)
    after = statistics(read_checkpoint(tmp_path / "x" / "checkpoints" / "epoch_latest.pt").state_dict)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    first, *_, last = [line.split("epoch")[1].split(") | ")[1] for line in log.splitlines() if "ion Recall (" in line]
    assert first == last


@pytest.mark.parametrize(
    ("settings", "keeps"),
    [
        (GIVEN, True),
        (GIVEN | {"no_freeze_bn": True}, False),
        (AS_THERE, False),
        (AS_THERE | {"freeze_bn": True}, True),
        (TOWERS, False),
        (GIVEN | {"freeze_vision": True}, True),
        (AS_THERE | {"freeze_vision": True}, True),
    ],
    ids=["--init", "--no-freeze-bn", "--resume", "--resume --freeze-bn", "random", "--freeze-vision", "both"],
)
def test_the_statistics_move_only_where_chinese_clip_moves_them(
    settings: dict[str, Any], keeps: bool, split: Path, tmp_path: Path
) -> None:
    assert with_statistics(changed_by_an_update(build(split, tmp_path, **settings))) != keeps


def test_without_freeze_bn_an_update_leaves_the_statistics_of_the_definition(split: Path, tmp_path: Path) -> None:
    """What Chinese-CLIP does: a tenth of the batch's mean and unbiased variance, nine tenths of what was there."""
    trainer = build(split, tmp_path, **AS_THERE)
    update = next(trainer._updates(0))
    norm, conv = trainer.model.visual.bn1, trainer.model.visual.conv1
    with torch.no_grad():
        maps = conv(normalised(update[0].pixels_B3RR).float())
    mean, variance = maps.mean(dim=(0, 2, 3)), maps.var(dim=(0, 2, 3))
    expected = 0.9 * norm.running_mean + 0.1 * mean, 0.9 * norm.running_var + 0.1 * variance
    trainer._set_training_mode()
    trainer._step(0, update)
    torch.testing.assert_close((norm.running_mean, norm.running_var), expected)


def test_statistics_that_move_with_given_weights_are_warned_of(
    split: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build(split, tmp_path, **AS_THERE)
    (warning,) = warnings(caplog)
    assert MOVE in warning
    assert "--freeze-bn keeps them" in warning
    caplog.clear()
    for settings in (AS_THERE | {"no_freeze_bn": True}, GIVEN, TOWERS, AS_THERE | {"freeze_vision": True}):
        build(split, tmp_path, **settings)
    assert warnings(caplog) == []


def test_statistics_of_random_weights_are_not_kept_unless_that_is_asked_for(
    split: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = TOWERS | {"init": random_weights(tmp_path / "random.pt")}
    assert with_statistics(changed_by_an_update(build(split, tmp_path, **given)))
    assert warnings(caplog) == []
    assert not with_statistics(changed_by_an_update(build(split, tmp_path, **given, freeze_bn=True)))
    (warning,) = warnings(caplog)
    assert "those of random weights (mean 0, variance 1)" in warning


def test_a_run_that_asks_for_statistics_over_all_processes_has_them(split: Path, tmp_path: Path) -> None:
    assert not build(split, tmp_path, **GIVEN, use_bn_sync=True).options.freeze_bn


def test_a_run_goes_on_as_it_began_and_says_so_when_told_otherwise(
    split: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(split, tmp_path, **GIVEN, val_data=None, max_epochs=1)
    run(split, tmp_path, **AS_THERE, val_data=None, max_epochs=1, name="y")
    assert [checkpoint(tmp_path, name)["resume"]["freeze_bn"] for name in "xy"] == [True, False]
    params = next((tmp_path / "x").glob("params_*.txt")).read_text(encoding="utf-8")
    assert "freeze_bn: True\n" in params
    later: dict[str, Any] = {"val_data": None, "max_epochs": 2}
    log = run(split, tmp_path, **TOWERS, **later)
    assert KEPT in log
    log = run(split, tmp_path, **TOWERS, **later, name="y")
    assert KEPT not in log
    log = run(split, tmp_path, **GIVEN, **later | {"max_epochs": 3}, no_freeze_bn=True)
    assert "--no-freeze-bn: this run was trained with --freeze-bn so far" in log
    before, after = (statistics(checkpoint(tmp_path, file=file)["state_dict"]) for file in ("epoch2.pt", "epoch3.pt"))
    assert any(not torch.equal(value, after[name]) for name, value in before.items())


def test_runs_of_earlier_versions_go_on_with_moving_statistics(split: Path, tmp_path: Path) -> None:
    run(split, tmp_path, **GIVEN, val_data=None, max_epochs=1)
    content = checkpoint(tmp_path)
    del content["resume"]["freeze_bn"]
    torch.save(content, tmp_path / "x" / "checkpoints" / "epoch_latest.pt")
    log = run(split, tmp_path, **GIVEN, val_data=None, max_epochs=2)
    assert MOVE in log


def test_adapters_keep_the_statistics_in_any_case(split: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    for settings in (GIVEN, AS_THERE, GIVEN | {"no_freeze_bn": True}):
        changed = changed_by_an_update(build(split, tmp_path, **settings, lora_rank=2))
        assert changed
        assert not with_statistics(changed)


def test_freeze_bn_is_obeyed_refused_or_warned_about(split: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--freeze-bn and --no-freeze-bn: they contradict each other"):
        options(split, tmp_path, freeze_bn=True, no_freeze_bn=True)
    messages = {
        "--freeze-bn changes nothing: this --vision-model has no batch normalisation.": {"freeze_bn": True},
        "--use-bn-sync changes nothing": TOWERS | {"freeze_bn": True, "use_bn_sync": True},
        "--no-freeze-bn changes nothing: --lora-rank and --freeze-vision keep": TOWERS
        | {"no_freeze_bn": True, "freeze_vision": True},
    }
    for words, settings in messages.items():
        (rule,) = broken(options(split, tmp_path, **settings), RULES)
        assert words in rule.message
    # The run scripts give it, whatever the tower.
    assert broken(options(split, tmp_path, no_freeze_bn=True), RULES) == []


def test_what_has_learned_is_told_from_what_has_not() -> None:
    norm = torch.nn.BatchNorm2d(2)
    assert not adapt.have_learned([norm])
    norm(torch.rand(4, 2, 3, 3))
    assert adapt.have_learned([norm])
