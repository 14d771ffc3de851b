"""Where this package means to differ from Chinese-CLIP and no other test says so; rows of docs/differences.md."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process_runs import RATE, checkpoint, emoji_split, run
from tiny_models import tiny_model

from cn_clip import ranks
from cn_clip.clip import create_model, load_from_name
from cn_clip.clip.configuration_bert import BertConfig
from cn_clip.clip.model import restore_model
from cn_clip.clip.modeling_bert import BertModel
from cn_clip.clip.opening import open_encoder
from cn_clip.command import Speaker
from cn_clip.errors import CnClipError, ConfigError
from cn_clip.eval import extract_features
from cn_clip.training.params import Options


@pytest.fixture(scope="module")
def split_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emoji_split(tmp_path_factory.mktemp("split"))


@pytest.fixture(autouse=True)
def same_random_state() -> Iterator[None]:
    """Runs seed torch; other tests shall not notice."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(threads)


def test_models_on_the_cpu_keep_every_bit_of_their_float32_weights(tmp_path: Path) -> None:
    model = tiny_model()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "model.pt")
    loaded, _ = load_from_name(str(tmp_path / "model.pt"), device="cpu")
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())
    weight = loaded.visual.conv1.weight
    assert not torch.equal(weight, weight.half().float())  # the test would not see rounding otherwise


def test_created_models_are_float32() -> None:
    model = create_model("RN-Tiny-64@BERT-Tiny-chinese")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_restored_models_keep_their_type() -> None:
    model = tiny_model()
    restored = restore_model(model, tiny_model(seed=1).state_dict(), None, False)
    assert {parameter.dtype for parameter in restored.parameters()} == {torch.float32}
    assert torch.equal(restored.visual.conv1.weight, tiny_model(seed=1).visual.conv1.weight)


def test_what_failed_without_a_word_says_what_it_wants() -> None:
    with pytest.raises(ConfigError, match="text and image cannot both be None"):
        tiny_model()(None, None)
    with pytest.raises(ConfigError, match="texts of 600 tokens; this model takes at most 512"):
        tiny_model().bert(torch.ones(1, 600, dtype=torch.long))
    with pytest.raises(ConfigError, match=r"expected one of .*'gelu'.*, got 'tanh'"):
        BertModel(BertConfig(7, 8, 1, 1, 8, hidden_act="tanh"))


def test_evaluation_takes_the_architecture_from_the_checkpoint(tmp_path: Path) -> None:
    torch.save({"state_dict": tiny_model().state_dict()}, tmp_path / "model.pt")
    options = extract_features.Options(extract_text_feats=True, model=str(tmp_path / "model.pt"), device="cpu")
    opened = open_encoder(options.chosen, Speaker(quiet=True))
    assert (opened.backend.resolution, opened.embed_dim) == (32, 24)


@pytest.mark.parametrize(("has_bf16", "dtype"), [(True, torch.bfloat16), (False, None)])
def test_amp_on_a_cpu_is_bfloat16_where_the_hardware_has_it(
    has_bf16: bool, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "cpu_has_bf16", lambda: has_bf16)
    assert ranks.autocast_dtype("amp", torch.device("cpu")) is dtype
    assert ranks.autocast_dtype("amp", torch.device("cuda")) is torch.float16


@pytest.mark.parametrize(("has_bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_training_is_in_bfloat16_on_gpus_that_have_it_unless_amp_is_asked_for(
    has_bf16: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "gpu_has_bf16", lambda _: has_bf16)
    monkeypatch.setattr(ranks, "cpu_has_bf16", lambda: False)
    default, gpu = Options(train_data="x").precision, torch.device("cuda", 0)
    assert ranks.autocast_dtype(default, gpu) is dtype
    assert ranks.autocast_dtype("amp", gpu) is torch.float16
    assert ranks.autocast_dtype(default, torch.device("cpu")) is None


def test_skip_scheduler_keeps_the_rate_that_the_cosine_would_lower(split_folder: Path, tmp_path: Path) -> None:
    off: dict[str, Any] = {"valid_epoch_interval": -1, "max_steps": 3}
    run(split_folder, tmp_path, name="kept", skip_scheduler=True, **off)
    run(split_folder, tmp_path, name="lowered", **off)
    rates = [checkpoint(tmp_path, name)["optimizer"]["param_groups"][0]["lr"] for name in ("kept", "lowered")]
    assert rates == [RATE, pytest.approx(RATE / 4)]  # cosine at step 2 of 3: (1 + cos 120 degrees) / 2


def test_an_interval_of_minus_one_never_validates(split_folder: Path, tmp_path: Path) -> None:
    log = run(split_folder, tmp_path, valid_step_interval=-1, valid_epoch_interval=-1, max_steps=1)
    assert "Global Steps: 1/1" in log
    assert "Validation" not in log


def test_validation_logs_recall_over_the_whole_split(split_folder: Path, tmp_path: Path) -> None:
    log = run(split_folder, tmp_path, max_epochs=1)
    line = (
        r"Validation Recall \(epoch 1 @ 3 steps\) \| 12 images, 12 texts \| "
        r"Text2Image R@1: [\d.]+ R@5: [\d.]+ R@10: [\d.]+ \| Image2Text R@1: [\d.]+ R@5: [\d.]+ R@10: [\d.]+"
    )
    assert re.search(line, log)


def test_a_step_due_by_both_intervals_is_validated_once(split_folder: Path, tmp_path: Path) -> None:
    log = run(split_folder, tmp_path, max_epochs=1, valid_step_interval=3, valid_epoch_interval=1)
    assert re.findall(r"Validation Result \(epoch \d @ (\d) steps\)", log) == ["0", "3"]


@pytest.mark.parametrize("flag", ["batch_size", "valid_batch_size"])
def test_a_batch_larger_than_the_data_stops_the_run(flag: str, split_folder: Path, tmp_path: Path) -> None:
    too_large: dict[str, Any] = {flag: 13}
    with pytest.raises(ConfigError, match=f"--{flag.replace('_', '-')} 13: larger than the 12 pairs"):
        run(split_folder, tmp_path, **too_large)


def test_a_loss_that_is_no_number_stops_the_run(split_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CnClipError, match=r"the loss is nan.*lower --lr"):
        run(split_folder, tmp_path, lr=1e30, max_steps=9, valid_epoch_interval=-1)
