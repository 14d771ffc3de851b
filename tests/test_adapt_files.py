"""Runs that save only their adapters: what the files hold, and how readers complete them from their base."""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_process_runs import TOWERS, build, checkpoint, emoji_split, run
from test_training_resume import killed_in
from torch import Tensor

from cn_clip import cli, zoo
from cn_clip.checkpoints import weights
from cn_clip.clip.encoder import Encoder
from cn_clip.clip.loading import load_from_name, open_model
from cn_clip.clip.model import CLIP
from cn_clip.clip.weights import base as base_module
from cn_clip.clip.weights.base import Base, fingerprint, of_weights
from cn_clip.clip.weights.checkpoint import read_checkpoint
from cn_clip.clip.weights.low_rank import LowRank, is_adapter
from cn_clip.errors import CheckpointError, ConfigError, DownloadError
from cn_clip.training import adapt, state
from cn_clip.training.params import Options
from cn_clip.training.stopping import EarlyStop

pytestmark = pytest.mark.skipif(find_spec("peft") is None, reason="peft makes adapters")

SETTINGS: dict[str, Any] = {"lora_rank": 2, "save_adapters": True, "max_epochs": 2}
QUIET: dict[str, Any] = {"valid_epoch_interval": -1, "val_data": None}


@pytest.fixture
def split(tmp_path: Path) -> Path:
    return emoji_split(tmp_path / "split")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Weights in float16, as the published files are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = CLIP.from_config(zoo.model_config(TOWERS["vision_model"], TOWERS["text_model"]))
    tensors = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    path = tmp_path / "weights" / "base.pt"
    path.parent.mkdir()
    torch.save({"state_dict": tensors}, path)
    return path


def file_of(logs: Path, name: str = "x", file: str = "epoch_latest.pt") -> Path:
    return logs / name / "checkpoints" / file


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        value.dtype == second[name].dtype and torch.equal(value, second[name]) for name, value in first.items()
    )


def call(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    cli.main(["checkpoint", *map(str, args), "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def one_step(split: Path, logs: Path, base: Path) -> Path:
    run(split, logs, init=str(base), max_steps=1, lora_rank=2, save_adapters=True, **QUIET)
    return file_of(logs)


# --- what is written


def test_every_file_holds_only_what_is_trained_and_gives_the_weights_of_a_run_that_saves_all(
    split: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EarlyStop, "observe", lambda *_: True)  # every validation is the best
    settings = SETTINGS | {"init": str(base), "loss": "siglip"}
    run(split, tmp_path, **settings)
    run(split, tmp_path, **settings | {"name": "full", "save_adapters": False})
    fingerprints = set()
    for file in ("epoch_latest.pt", "epoch2.pt", "epoch_best.pt"):
        alone, full = checkpoint(tmp_path, file=file), checkpoint(tmp_path, "full", file)
        trained = {name for name in full["state_dict"] if is_adapter(name) or name == "module.logit_scale"}
        assert alone["state_dict"].keys() == trained
        assert len(trained) > 2
        assert alone["lora"] == full["lora"] == {"rank": 2, "alpha": 4.0}
        assert alone.keys() - full.keys() == {"base"}
        assert alone["base"]["name"] == str(base.resolve())
        fingerprints.add(alone["base"]["fingerprint"])
        for merged in (True, False):
            first, second = (
                read_checkpoint(file_of(tmp_path, name, file), merge_lora=merged) for name in ("x", "full")
            )
            assert same(first.state_dict, second.state_dict)
        assert file_of(tmp_path, file=file).stat().st_size < file_of(tmp_path, "full", file).stat().st_size / 4
    assert fingerprints == {of_weights(read_checkpoint(base).state_dict)}
    first, second = checkpoint(tmp_path), checkpoint(tmp_path, "full")
    assert first["resume"]["logit_bias"] == second["resume"]["logit_bias"]
    assert same(first["optimizer"]["state"][0], second["optimizer"]["state"][0])


def test_a_killed_run_goes_on_to_the_same_adapters(split: Path, base: Path, tmp_path: Path) -> None:
    settings = SETTINGS | {"init": str(base), "save_step_frequency": 1, **QUIET}
    run(split, tmp_path, name="whole", **settings)
    killed_in("_train_epoch", 3, split, tmp_path, **settings)
    assert "Global Steps: 4/6" in run(split, tmp_path, **settings)
    killed, whole = (checkpoint(tmp_path, name) for name in ("x", "whole"))
    assert same(killed["state_dict"], whole["state_dict"])
    assert killed["base"] == whole["base"]


def test_a_run_goes_on_from_the_adapters_of_another_and_names_the_same_base(
    split: Path, base: Path, tmp_path: Path
) -> None:
    run(split, tmp_path, name="one", init=str(base), max_steps=1, lora_rank=2, save_adapters=True, **QUIET)
    resume = str(file_of(tmp_path, "one"))
    run(split, tmp_path, resume=resume, reset_data_offset=True, max_steps=2, lora_rank=2, save_adapters=True, **QUIET)
    assert checkpoint(tmp_path)["base"] == checkpoint(tmp_path, "one")["base"]
    # Without the flag the same file gives a run that saves all of its weights.
    run(split, tmp_path, name="all", resume=resume, reset_data_offset=True, max_steps=2, lora_rank=2, **QUIET)
    assert "base" not in checkpoint(tmp_path, "all")
    assert same(read_checkpoint(file_of(tmp_path)).state_dict, read_checkpoint(file_of(tmp_path, "all")).state_dict)


def test_weights_given_to_resume_are_a_base_too(split: Path, base: Path, tmp_path: Path) -> None:
    flags = {"resume": str(base), "reset_optimizer": True, "reset_data_offset": True}
    run(split, tmp_path, max_steps=1, lora_rank=2, save_adapters=True, **flags, **QUIET)
    assert checkpoint(tmp_path)["base"]["name"] == str(base.resolve())
    # The same command without these flags goes on, as a stopped run says.
    assert "Global Steps: 2/2" in run(split, tmp_path, max_steps=2, lora_rank=2, save_adapters=True, **QUIET)


def test_adapters_may_be_of_a_base_that_is_adapters_itself(split: Path, base: Path, tmp_path: Path) -> None:
    first = one_step(split, tmp_path, base)
    run(split, tmp_path, name="second", init=str(first), max_steps=1, lora_rank=4, save_adapters=True, **QUIET)
    run(split, tmp_path, name="full", init=str(first), max_steps=1, lora_rank=4, **QUIET)
    second = checkpoint(tmp_path, "second")
    assert second["base"]["name"] == str(first.resolve())
    assert same(
        read_checkpoint(file_of(tmp_path, "second")).state_dict, read_checkpoint(file_of(tmp_path, "full")).state_dict
    )


def test_the_size_that_is_announced_is_that_of_the_file(split: Path, base: Path, tmp_path: Path) -> None:
    settings = SETTINGS | {"init": str(base)}
    planned = build(split, tmp_path / "nothing", **settings).disk_plan().file_bytes
    run(split, tmp_path, **settings)
    assert planned <= file_of(tmp_path).stat().st_size < 2 * planned


# --- what is refused before training


def test_adapters_alone_need_adapters() -> None:
    with pytest.raises(ConfigError, match="--save-adapters: needs --lora-rank"):
        Options(train_data="x", save_adapters=True)
    with pytest.raises(ConfigError, match=r"--save-adapters and --precision fp16: .* rounded weights"):
        Options(train_data="x", save_adapters=True, lora_rank=2, precision="fp16")


def test_adapters_of_random_weights_are_refused(split: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--save-adapters: .* random weights.* name the base with --init"):
        run(split, tmp_path, **SETTINGS, **QUIET)


def test_a_run_that_has_saved_all_weights_does_not_become_the_base_of_its_own_files(
    split: Path, base: Path, tmp_path: Path
) -> None:
    settings = SETTINGS | {"init": str(base), **QUIET}
    run(split, tmp_path, **settings | {"save_adapters": False, "max_epochs": 1})
    with pytest.raises(ConfigError, match=r"epoch_latest\.pt holds all weights.* leave --save-adapters out"):
        run(split, tmp_path, **settings)
    with pytest.raises(ConfigError, match=r"epoch1\.pt holds all weights"):
        run(split, tmp_path, **settings | {"init": str(file_of(tmp_path, file="epoch1.pt")), "overwrite": True})
    given = SETTINGS | {"resume": str(file_of(tmp_path)), "name": "other", **QUIET}
    with pytest.raises(ConfigError, match=r"epoch_latest\.pt holds all weights"):
        run(split, tmp_path, **given)


def test_a_base_for_pictures_of_another_size_is_refused(base: Path, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(base)
    start = state.Start(base, False, str(base), with_optimizer=False, with_position=False)
    model = CLIP.from_config(zoo.model_config(TOWERS["vision_model"], TOWERS["text_model"]))
    rows = model.visual.positional_embedding
    model.visual.positional_embedding = torch.nn.Parameter(torch.zeros(len(rows) + 1, rows.shape[1]))
    options = Options(train_data="x", init=str(base), lora_rank=2, save_adapters=True)
    with pytest.raises(ConfigError, match=r"base\.pt is for pictures of another size"):
        adapt.base_of_run(options, model, start, checkpoint, tmp_path)


# --- reading


def test_every_command_on_checkpoints_reads_them(
    split: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = one_step(split, tmp_path, base)
    weights = read_checkpoint(path).state_dict
    capsys.readouterr()
    found = call(capsys, "info", path)
    assert found["base"] == checkpoint(tmp_path)["base"]
    assert {found["vision_model"], found["text_model"]} == {None}  # the small pair, see shortcuts.py, has no names
    assert found["weight_bytes"] < found["bytes"]
    cli.main(["checkpoint", "info", str(path)])
    assert f"adapters of {base.resolve()} ({found['base']['fingerprint']})" in capsys.readouterr().out
    call(capsys, "strip", path, "--output", tmp_path / "merged.pt")
    assert same(torch.load(tmp_path / "merged.pt", weights_only=True)["state_dict"], with_module(weights))
    call(capsys, "export", path, "--output", tmp_path / "merged.safetensors")
    assert same(read_checkpoint(tmp_path / "merged.safetensors").state_dict, weights)
    loaded, _ = load_from_name(str(path), device="cpu")
    assert same(dict(loaded.state_dict()), {name: weights[name] for name in loaded.state_dict()})
    assert open_model(path)[1].lora == LowRank(2, 4.0)
    rows = [Encoder(str(file), device="cpu").encode_texts(["猫", "狗"]) for file in (path, tmp_path / "merged.pt")]
    assert np.array_equal(*rows)
    ends = ["--zeroshot", str(base), "--finetuned", str(path)]
    cli.main(["wise-ft", *ends, "--alpha=1", "--output", str(tmp_path / "mixed.pt")])
    name = "visual.transformer.resblocks.0.attn.in_proj_weight"
    torch.testing.assert_close(read_checkpoint(tmp_path / "mixed.pt").state_dict[name], weights[name])
    assert not torch.equal(weights[name], read_checkpoint(base).state_dict[name].float())


def test_no_command_replaces_the_base_of_what_it_reads(
    split: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, before = str(one_step(split, tmp_path, base)), base.read_bytes()
    commands = [["checkpoint", "strip", path, "--output", str(base)], ["convert", path, str(base), "--overwrite"]]
    for command in [*commands, ["checkpoint", "average", path, path, "--output", str(base)]]:
        with pytest.raises(SystemExit):
            cli.main(command)
        assert f"would overwrite {base}, which it reads" in capsys.readouterr().err
    assert base.read_bytes() == before


def test_nor_the_base_that_is_known_by_its_name(split: Path, base: Path, tmp_path: Path) -> None:
    path = renamed(one_step(split, tmp_path, base), "ViT-B-16")
    beside = path.parent / "clip_cn_vit-b-16.pt"
    shutil.copy(base, beside)
    with pytest.raises(ConfigError, match=r"would overwrite .*clip_cn_vit-b-16\.pt, which it reads"):
        weights.convert(path, beside, "pt", "keep")


def with_module(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{name}": value for name, value in tensors.items()}


@pytest.mark.parametrize("mapped", [False, True])
def test_a_base_that_was_moved_is_found_beside_the_adapters(
    mapped: bool, split: Path, base: Path, tmp_path: Path
) -> None:
    path = one_step(split, tmp_path, base)
    before = read_checkpoint(path).state_dict
    moved = path.parent / base.name
    shutil.move(base, moved)
    found = read_checkpoint(path, mapped=mapped)
    assert same(found.state_dict, before)
    assert found.base is not None
    assert found.base.name == str(moved)


def test_the_base_may_be_written_in_another_type_of_the_same_values(split: Path, base: Path, tmp_path: Path) -> None:
    path = one_step(split, tmp_path, base)
    before = read_checkpoint(path).state_dict
    tensors = {name: value.float() for name, value in reversed(read_checkpoint(base).state_dict.items())}
    torch.save(tensors, base)
    assert same(read_checkpoint(path).state_dict, {name: before[name] for name in before})


def test_another_base_is_refused_with_both_fingerprints(split: Path, base: Path, tmp_path: Path) -> None:
    path = one_step(split, tmp_path, base)
    expected = checkpoint(tmp_path)["base"]["fingerprint"]
    tensors = torch.load(base, weights_only=True)["state_dict"]
    tensors["visual.proj"][0, 0] += 1
    torch.save({"state_dict": tensors}, base)
    message = rf"epoch_latest\.pt: holds only LoRA adapters of the base {base} \(fingerprint {expected}\); {base}"
    with pytest.raises(CheckpointError, match=rf"{message} has the fingerprint [0-9a-f]{{16}}: other weights; put"):
        read_checkpoint(path)


def test_a_base_that_is_gone_is_named_with_what_to_do(split: Path, base: Path, tmp_path: Path) -> None:
    path = one_step(split, tmp_path, base)
    base.unlink()
    with pytest.raises(CheckpointError) as refused:
        load_from_name(str(path), device="cpu")
    entry = checkpoint(tmp_path)["base"]
    assert str(refused.value) == (
        f"{path}: holds only LoRA adapters of the base {base} (fingerprint {entry['fingerprint']}), which is not "
        "there; put the base back, or a copy of it beside this file as base.pt"
    )
    with pytest.raises(CheckpointError, match="which is not there"):
        run(split, tmp_path, init=str(base), max_steps=2, lora_rank=2, save_adapters=True, **QUIET)


def renamed(path: Path, name: str) -> Path:
    content = torch.load(path, weights_only=True)
    content["base"]["name"] = name
    torch.save(content, path)
    return path


def test_a_published_base_is_opened_as_its_name_is(
    split: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = one_step(split, tmp_path, base)
    before = read_checkpoint(path).state_dict
    renamed(path, "ViT-B-16")
    asked: list[str] = []

    def cached(name: str) -> Path:
        asked.append(name)
        return base

    monkeypatch.setattr(base_module, "weight_file", cached)
    found = read_checkpoint(path)
    assert same(found.state_dict, before)
    assert (asked, found.base and found.base.name) == (["ViT-B-16"], "ViT-B-16")
    shutil.copy(base, path.parent / "clip_cn_vit-b-16.pt")
    assert same(read_checkpoint(path).state_dict, before)
    assert asked == ["ViT-B-16"]  # the file beside the adapters was enough
    (path.parent / "clip_cn_vit-b-16.pt").unlink()

    def offline(name: str) -> Path:
        raise DownloadError(f"no network for {name}")

    monkeypatch.setattr(base_module, "weight_file", offline)
    with pytest.raises(CheckpointError, match=r"which cannot be fetched \(no network for ViT-B-16\); put the base"):
        read_checkpoint(path)


# --- files from strangers


def pickled(path: Path) -> None:
    torch.save({"state_dict": Path("run me")}, path)


def text(path: Path) -> None:
    path.write_text("password=hunter2")


def unknown_to_numpy(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"w": torch.zeros(2, dtype=torch.complex32)}, path)


def folder(path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text('{"password": "hunter2"}')
    (path / "model.safetensors").write_text("hunter2")


def fifo(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("write", [pickled, text, unknown_to_numpy, folder, fifo])
def test_a_path_that_is_no_weight_file_is_refused_without_its_content(
    write: Callable[[Path], None], split: Path, base: Path, tmp_path: Path
) -> None:
    path = one_step(split, tmp_path, base)
    base.unlink()
    write(base)
    with pytest.raises(CheckpointError) as refused:
        read_checkpoint(path)
    assert f"{base} cannot be read as one, cn-clip checkpoint info {base} says why" in str(refused.value)
    assert "hunter2" not in str(refused.value)


def test_a_file_that_names_itself_is_refused(split: Path, base: Path, tmp_path: Path) -> None:
    path = one_step(split, tmp_path, base)
    with pytest.raises(CheckpointError, match="which is itself"):
        read_checkpoint(renamed(path, str(path)))


def test_a_relative_path_is_looked_for_only_beside_the_adapters(
    split: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = renamed(one_step(split, tmp_path, base), "weights/base.pt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="which is not there"):
        read_checkpoint(path)
    shutil.copy(base, path.parent)
    assert read_checkpoint(path).base is not None


@pytest.mark.parametrize(
    "entry",
    [
        *(None, "base.pt", {}, {"name": "a.pt"}, {"name": "a.pt", "fingerprint": "0" * 15}),
        *({"name": name, "fingerprint": "0" * 16} for name in (3, "", "a\0b")),
    ],
)
def test_an_entry_that_names_no_base_is_refused(entry: object, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    adapters = {"a.lora_A.weight": torch.ones(1, 2), "a.lora_B.weight": torch.ones(2, 1)}
    torch.save({"state_dict": adapters, "lora": {"rank": 1, "alpha": 1.0}, "base": entry}, path)
    with pytest.raises(CheckpointError, match=r'run\.pt: the entry "base" is not'):
        read_checkpoint(path)


@pytest.mark.parametrize("name", ["..", "/", "a/..", "C:\\weights\\.."])
def test_no_name_leads_out_of_the_folder(name: str, tmp_path: Path) -> None:
    assert Base(name, "0" * 16).find(tmp_path / "folder") in (None, Path("/"))


def test_a_path_of_windows_is_found_by_its_last_part(tmp_path: Path) -> None:
    (tmp_path / "base.pt").touch()
    assert Base(r"C:\weights\base.pt", "0" * 16).find(tmp_path) == tmp_path / "base.pt"


def test_the_fingerprint_is_of_values_and_names_in_any_order() -> None:
    tensors = {"b": torch.tensor([1.0, 2.0]), "a": torch.tensor(3)}
    expected = of_weights(tensors)
    assert of_weights({"a": torch.tensor(3), "b": torch.tensor([1.0, 2.0], dtype=torch.bfloat16)}) == expected
    assert of_weights({"a": torch.tensor(3), "b": torch.tensor([1.0, 2.5])}) != expected
    assert of_weights({"a": torch.tensor(3), "c": torch.tensor([1.0, 2.0])}) != expected
    assert fingerprint(sorted(tensors.items())) == expected
