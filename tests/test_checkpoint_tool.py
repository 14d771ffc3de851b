"""`cn-clip checkpoint …`: what a file holds, weights alone, means, safetensors; and what is refused in one line."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from dataset_files import run_script, tree
from safetensors import safe_open
from safetensors.torch import save
from test_checkpoint import ADAPTED, adapted_file
from tiny_models import TEXT, TOKENS, tiny_model, tiny_pixels
from torch import Tensor

from cn_clip import cli, zoo
from cn_clip.checkpoints.weights import mean, num_bytes
from cn_clip.clip.loading import load_from_name
from cn_clip.clip.model import CLIP
from cn_clip.clip.weights.checkpoint import Checkpoint, read_checkpoint
from cn_clip.clip.weights.writing import write_safetensors
from cn_clip.errors import CheckpointError


def training_file(path: Path, model: CLIP, **changes: Any) -> Path:
    """A checkpoint as training leaves it: weights, both moments of AdamW, resume state."""
    optimizer = torch.optim.AdamW(model.parameters())
    image_BD, text_BD, scale = model(tiny_pixels(model), TOKENS)
    torch.autograd.backward((scale * image_BD @ text_BD.T).sum())
    state = {f"module.{name}": value.clone() for name, value in model.state_dict().items()}
    optimizer.step()
    content = {"epoch": 3, "step": 7, "name": "run", "state_dict": state, "optimizer": optimizer.state_dict()}
    torch.save(content | {"resume": {"epoch": 3, "batch": 0}} | changes, path)
    return path


def call(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    cli.main(["checkpoint", *map(str, args), "--json"])
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def refusal(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    with pytest.raises(SystemExit):
        cli.main(["checkpoint", *map(str, args)])
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


# --- info


def test_info_tells_what_a_training_checkpoint_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("resnet")
    path = training_file(tmp_path / "run.pt", model)
    found = call(capsys, "info", path)
    trainable = sum(parameter.numel() for parameter in model.parameters())
    counters = sum(name.endswith("num_batches_tracked") for name in model.state_dict())
    assert {key: found[key] for key in ("name", "epoch", "step", "optimizer", "resume", "lora", "resolution")} == {
        "name": "run",
        "epoch": 3,
        "step": 7,
        "optimizer": True,
        "resume": True,
        "lora": None,
        "resolution": 64,
    }
    assert found["num_params"] == trainable
    assert found["dtypes"] == {"float32": len(model.state_dict()) - counters, "int64": counters}
    # Two moments of each value, and one step counter of 4 bytes a tensor.
    num_tensors = len(list(model.parameters()))
    assert found["optimizer_bytes"] == 2 * 4 * trainable + 4 * num_tensors
    assert found["bytes"] == path.stat().st_size


def test_info_names_the_towers_and_the_share_of_the_optimizer(
    tmp_path: Path, full_towers: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = zoo.model_config("ViT-Tiny-64", "BERT-Tiny-chinese")
    torch.save({"state_dict": CLIP.from_config(config).state_dict()}, tmp_path / "plain.pt")
    cli.main(["checkpoint", "info", str(tmp_path / "plain.pt")])
    plain = capsys.readouterr().out
    assert "ViT-Tiny-64 @ BERT-Tiny-chinese, 64 px" in plain
    assert "no, 0.0 MiB (0%)" in plain
    cli.main(["checkpoint", "info", str(training_file(tmp_path / "run.pt", tiny_model()))])
    trained = capsys.readouterr().out
    assert "ViT 2 x 64 @ BERT 2 x 64, 32 px" in trained
    assert "yes, 1.6 MiB (65%)" in trained


def test_info_counts_an_optimizer_of_any_depth_each_part_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state: dict[str, Any] = {"moment": torch.ones(4), "again": [], "many": [torch.ones(2)]}
    state["again"] += [state, state["again"]]
    for _ in range(40):  # counted each time it is met, it would be counted 2^40 times
        state["many"] = [state["many"]] * 2
    path = training_file(tmp_path / "run.pt", tiny_model(), optimizer=state, name=["no", "name"])
    found = call(capsys, "info", path)
    assert (found["optimizer_bytes"], found["name"]) == (24, None)
    deep: list[Any] = [torch.ones(3)]
    for _ in range(10_000):
        deep = [deep]
    assert num_bytes(deep) == 12


@pytest.mark.parametrize("vision", zoo.VISION_MODELS)
def test_every_picture_tower_is_known_by_its_shape(vision: str) -> None:
    assert zoo.tower_names(zoo.model_config(vision, "RBT3-chinese")) == (vision, "RBT3-chinese")


def test_towers_at_another_resolution_or_dropout_keep_their_names_and_others_have_none() -> None:
    known = zoo.model_config("ViT-B-16", "RBT3-chinese")
    assert zoo.tower_names(zoo.at_resolution(known, 448)) == ("ViT-B-16", "RBT3-chinese")
    assert zoo.tower_names(zoo.ModelConfig(known.vision, TEXT)) == ("ViT-B-16", None)


def test_info_tells_adapters_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = call(capsys, "info", adapted_file(tmp_path / "run.pt"))
    assert found["lora"] == {"rank": 1, "alpha": 2.0}
    assert (found["num_params"], found["num_lora_params"]) == (4 + 3 + 4, 4 + 4 + 5)
    assert found["vision_model"] is None
    assert "no picture tower" in found["unknown"]


def test_the_script_prints_the_same_as_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = training_file(tmp_path / "run.pt", tiny_model())
    typed = run_script("checkpoints/info.py", path, "--json")
    assert typed.returncode == 0, typed.stderr
    assert json.loads(typed.stdout) == call(capsys, "info", path)
    refused = run_script("checkpoints/info.py", tmp_path / "nothing.pt")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("error: ")
    assert refused.stderr.count("\n") == 1


# --- strip


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_strip_keeps_the_weights_bit_for_bit_and_nothing_else(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = training_file(tmp_path / "run.pt", tiny_model(kind), wise_ft={"alpha": 0.5})
    result = call(capsys, "strip", path, "--output", tmp_path / "small.pt")
    small = torch.load(tmp_path / "small.pt", weights_only=True)
    before = torch.load(path, weights_only=True)
    assert {key: value for key, value in small.items() if key != "state_dict"} == {"epoch": 3, "step": 7, "name": "run"}
    assert list(small["state_dict"]) == list(before["state_dict"])
    assert all(torch.equal(value, small["state_dict"][name]) for name, value in before["state_dict"].items())
    assert result["bytes"] == (tmp_path / "small.pt").stat().st_size < 0.4 * result["bytes_before"]


def test_strip_and_info_count_all_files_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder").mkdir()
    torch.save(dict(tiny_model().state_dict()), tmp_path / "folder" / "pytorch_model.bin")
    (tmp_path / "folder" / "notes.txt").write_bytes(b"seven b")
    result = call(capsys, "strip", tmp_path / "folder", "--output", tmp_path / "small.pt")
    expected = (tmp_path / "folder" / "pytorch_model.bin").stat().st_size + 7
    assert result["bytes_before"] == expected == call(capsys, "info", tmp_path / "folder")["bytes"]


def test_strip_merges_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(capsys, "strip", adapted_file(tmp_path / "run.pt"), "--output", tmp_path / "small.pt")
    content = torch.load(tmp_path / "small.pt", weights_only=True)
    assert content.keys() == {"epoch", "step", "name", "state_dict"}
    assert content["state_dict"]["module.a.weight"].tolist() == [[5.0, -2.0], [9.0, -2.0]]
    assert content["state_dict"].keys() == {f"module.{name}" for name in ADAPTED if "lora" not in name}


def test_strip_leaves_out_the_bias_that_chinese_clip_does_not_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tiny_model().state_dict() | {"logit_bias": torch.tensor(-10.0)}
    torch.save({"state_dict": state}, tmp_path / "run.pt")
    call(capsys, "strip", tmp_path / "run.pt", "--output", tmp_path / "small.pt")
    assert read_checkpoint(tmp_path / "small.pt").state_dict.keys() == tiny_model().state_dict().keys()


def test_strip_to_fp16_is_half_as_large_and_keeps_norms_and_scale_in_float32(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = training_file(tmp_path / "run.pt", tiny_model())
    call(capsys, "strip", path, "--output", tmp_path / "half.pt", "--precision", "fp16")
    call(capsys, "strip", tmp_path / "half.pt", "--output", tmp_path / "full.pt", "--precision", "fp32")
    half, full = (read_checkpoint(tmp_path / name).state_dict for name in ("half.pt", "full.pt"))
    norms = [name for name in half if name.startswith("visual.") and ".ln_" in name]
    assert norms
    assert all(half[name].dtype is torch.float32 for name in [*norms, "logit_scale"])
    others = {half[name].dtype for name in half if name.startswith("bert.") or name.endswith("proj")}
    assert others == {torch.float16}
    assert {value.dtype for value in full.values()} == {torch.float32}
    original = tiny_model()
    loaded, _ = load_from_name(str(tmp_path / "full.pt"), device="cpu")
    got, expected = loaded.encode_image(tiny_pixels(original)), original.encode_image(tiny_pixels(original))
    torch.testing.assert_close(got, expected, atol=5e-3, rtol=5e-3)  # float16 has 11 bits


def test_weights_beyond_float16_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = tiny_model().state_dict()
    state["visual.conv1.weight"] = torch.full_like(state["visual.conv1.weight"], 1e5)
    torch.save({"state_dict": state}, tmp_path / "run.pt")
    error = refusal(capsys, "strip", tmp_path / "run.pt", "--output", tmp_path / "half.pt", "--precision", "fp16")
    assert "visual.conv1.weight holds values too large for float16; use fp32" in error
    assert list(tree(tmp_path)) == ["run.pt"]


# --- average


def checkpoint(name: str, tensors: dict[str, Tensor]) -> Checkpoint:
    return Checkpoint(Path(name), tensors)


def test_the_mean_is_taken_in_float64_and_whole_numbers_come_from_the_last() -> None:
    # In float32, 1e8 + 1 - 1e8 is 0.
    values = [[1.0, 1e8], [2.0, 1.0], [6.0, -1e8]]
    files = [
        checkpoint(f"{number}.pt", {"w": torch.tensor(row), "count": torch.tensor(number)})
        for number, row in enumerate(values)
    ]
    result = mean(files)
    assert result["w"].tolist() == pytest.approx([3.0, 1 / 3])
    assert result["w"].dtype is torch.float32
    assert result["count"].item() == 2
    assert files[0].state_dict["w"].tolist() == [1.0, 1e8]


def test_the_mean_of_two_types_has_the_wider_one() -> None:
    half = checkpoint("a.pt", {"w": torch.tensor([1.0], dtype=torch.float16)})
    full = checkpoint("b.pt", {"w": torch.tensor([2.0])})
    for files in ([half, full], [full, half]):
        assert mean(files)["w"].dtype is torch.float32
        assert mean(files)["w"].tolist() == [1.5]


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"w": torch.ones(3)}, r"a\.pt and b\.pt are of different models: w is \(2,\) and \(3,\)"),
        ({}, r"w is \(2,\) and missing"),
        ({"w": torch.ones(2), "v": torch.ones(1)}, r"v is missing and \(1,\)"),
    ],
)
def test_a_mean_of_different_models_is_refused_naming_the_tensor(other: dict[str, Tensor], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        mean([checkpoint("a.pt", {"w": torch.ones(2)}), checkpoint("b.pt", other)])


def test_average_writes_a_checkpoint_of_the_last_ones_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [tiny_model("resnet", seed=seed) for seed in (0, 1)]
    files = [training_file(tmp_path / f"{n}.pt", model, epoch=n, name=f"n{n}") for n, model in enumerate(models)]
    cli.main(["checkpoint", "average", *map(str, files), "--output", str(tmp_path / "mean.pt"), "--json"])
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result["files"] == list(map(str, files))
    assert printed.err == ""  # no progress bar into a file
    merged = read_checkpoint(tmp_path / "mean.pt")
    assert (merged.epoch, merged.extra) == (1, {"name": "n1"})
    first, second = (model.visual.bn1.running_var for model in (read(path) for path in files))
    assert torch.allclose(merged.state_dict["visual.bn1.running_var"], (first + second) / 2)


def read(path: Path) -> CLIP:
    return load_from_name(str(path), device="cpu")[0]


# --- export


def test_export_is_read_back_bit_for_bit_and_says_what_it_is(
    tmp_path: Path, full_towers: None, capsys: pytest.CaptureFixture[str]
) -> None:
    model = CLIP.from_config(zoo.model_config("ViT-Tiny-64", "BERT-Tiny-chinese"))
    content = {"epoch": 2, "step": 9, "name": "表情", "state_dict": model.state_dict()}
    torch.save(content, tmp_path / "run.pt")
    call(capsys, "export", tmp_path / "run.pt", "--output", tmp_path / "model.safetensors")
    back = read_checkpoint(tmp_path / "model.safetensors").state_dict
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(value, back[name]) for name, value in model.state_dict().items())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        about = file.metadata()
    assert about.pop("cn_clip")
    assert about == {
        "format": "pt",
        "name": "表情",
        "epoch": "2",
        "step": "9",
        "vision_model": "ViT-Tiny-64",
        "text_model": "BERT-Tiny-chinese",
    }


def test_export_takes_weights_that_share_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = torch.arange(6.0)
    torch.save({"state_dict": {"a": whole[:3], "b": whole[3:], "c": whole.view(2, 3).T}}, tmp_path / "run.pt")
    call(capsys, "export", tmp_path / "run.pt", "--output", tmp_path / "model.safetensors")
    back = read_checkpoint(tmp_path / "model.safetensors").state_dict
    assert [back[name].tolist() for name in "abc"] == [[0, 1, 2], [3, 4, 5], [[0, 3], [1, 4], [2, 5]]]


# --- refusals


@pytest.mark.parametrize("way", ["same", "dotted", "link", "hard link"])
def test_the_file_that_is_read_is_never_overwritten(
    way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = training_file(tmp_path / "run.pt", tiny_model())
    (tmp_path / "folder").mkdir()
    output = {"same": path, "dotted": tmp_path / "folder" / ".." / "run.pt"}.get(way, tmp_path / "other.pt")
    if "link" in way:
        (os.link if way == "hard link" else os.symlink)(path, output)
    before = path.read_bytes()
    for name, inputs in (("strip", [path]), ("average", [path, path])):
        assert "would overwrite" in refusal(capsys, name, *inputs, "--output", output)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["info", "bad.pt"], "bad.pt: is text, not weights; give the weight file"),
        (["info", "torn.pt"], "torn.pt: is cut off, or damaged; download or copy it again"),
        (["export", "vast.pt", "--output", "x.safetensors"], "vast.pt: a holds fewer values than its shape"),
        (["export", "complex.pt", "--output", "x.safetensors"], "x.safetensors: cannot be written (torch.complex128)"),
        (["strip", "missing.pt", "--output", "x.pt"], "missing.pt: no such file"),
        (["average", "run.pt", "bad.pt", "--output", "x.pt"], "bad.pt: is text, not weights; give the weight file"),
        (["average", "run.pt", "--output", "x.pt"], "expected two or more checkpoints, got 1"),
        (["export", "run.pt", "--output", "x.pt"], "expected a name that ends in .safetensors"),
        (["strip", "run.pt", "--output", "x.safetensors"], "use cn-clip checkpoint export"),
        (["strip", "run.pt", "--output", "nowhere/x.pt"], "the folder nowhere does not exist"),
        (["strip", "run.pt"], "--output: expected the file to write"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line_and_leaves_no_file(
    args: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    training_file(Path("run.pt"), tiny_model())
    Path("bad.pt").write_bytes(b"no checkpoint")
    Path("torn.pt").write_bytes(Path("run.pt").read_bytes()[:5000])
    torch.save({"state_dict": {"a": torch.ones(1).expand(10**6, 10**6)}}, "vast.pt")
    torch.save({"state_dict": {"a": torch.ones(1, dtype=torch.complex128)}}, "complex.pt")
    before = tree(tmp_path)
    assert reason in refusal(capsys, *args)
    assert tree(tmp_path) == before


def test_a_disk_that_is_full_leaves_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = training_file(tmp_path / "run.pt", tiny_model())
    (tmp_path / "small.pt").write_bytes(b"earlier")

    def full(content: object, stream: Any) -> None:
        stream.write(b"some")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    error = refusal(capsys, "strip", path, "--output", tmp_path / "small.pt")
    assert "small.pt: cannot be written (No space left on device)" in error
    assert tree(tmp_path).keys() == {"run.pt", "small.pt"}
    assert (tmp_path / "small.pt").read_bytes() == b"earlier"


def test_safetensors_are_written_tensor_by_tensor_as_the_library_would(tmp_path: Path) -> None:
    tensors = {
        "b": torch.arange(12.0).reshape(3, 4),
        "a": torch.arange(6.0).half(),
        "无": torch.tensor(3),
        "z": torch.arange(10.0).reshape(5, 2).t(),
        "d": torch.arange(7.0).bfloat16(),
        "e": torch.empty(0, 4),
        "f": torch.tensor([True, False, True]),
    }
    path, metadata = tmp_path / "a.safetensors", {"b": "2", "a": "1"}
    write_safetensors(path, tensors, metadata)
    ours = path.read_bytes()
    theirs = save({name: value.contiguous() for name, value in tensors.items()}, metadata)
    heads = [(8 + int.from_bytes(one[:8], "little"), one) for one in (ours, theirs)]
    assert [json.loads(one[8:end]) for end, one in heads] == [json.loads(theirs[8 : heads[1][0]])] * 2
    assert ours[heads[0][0] :] == theirs[heads[1][0] :]
    assert heads[0][0] % 8 == 0
