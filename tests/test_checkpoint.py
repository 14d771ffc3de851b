"""The weight reader: every spelling of a file gives the same tensors, and what is no checkpoint is refused."""

import gzip
import json
import os
import pickle
import shutil
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deterministic import weight
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from other_kinds import OTHER_KINDS
from safetensors.torch import save_file
from tiny_models import CONFIGS, TEXT, TOKENS, VIT, tiny_model, tiny_pixels

from cn_clip import zoo
from cn_clip.clip.loading import build, open_model
from cn_clip.clip.model import CLIP
from cn_clip.clip.weights.checkpoint import (
    Checkpoint,
    convert_state_dict,
    fit,
    fuse_wqkv,
    infer_config,
    read_checkpoint,
    resize_position_embedding,
)
from cn_clip.clip.weights.low_rank import LowRank, merge
from cn_clip.errors import CheckpointError
from cn_clip.training.state import find_weights

GOLDEN = Path(__file__).parent / "golden"
State = dict[str, torch.Tensor]
PUBLISHED_PAIRS = {
    "ViT-B-32": "RoBERTa-wwm-ext-base-chinese",
    "ViT-B-16": "RoBERTa-wwm-ext-base-chinese",
    "ViT-L-14": "RoBERTa-wwm-ext-base-chinese",
    "ViT-L-14-336": "RoBERTa-wwm-ext-base-chinese",
    "ViT-H-14": "RoBERTa-wwm-ext-large-chinese",
    "RN50": "RBT3-chinese",
}


def state_of(kind: str = "vit") -> State:
    return dict(tiny_model(kind).state_dict())


def prefixed(state: Mapping[str, torch.Tensor]) -> State:
    return {f"module.{key}": value for key, value in state.items()}


def with_rest(state: State) -> State:
    """As older files of Chinese-CLIP have it."""
    rest = {
        "bert.pooler.dense.weight": torch.ones(64, 64),
        "bert.pooler.dense.bias": torch.ones(64),
        "bert.embeddings.position_ids": torch.arange(512)[None],
    }
    return state | rest


def fused(state: State, *towers: str) -> State:
    chosen = {key: value for key, value in state.items() if key.startswith(towers)}
    return {key: value for key, value in state.items() if key not in chosen} | fuse_wqkv(chosen)


def optimizer_state(rate: Any) -> dict[str, Any]:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state: dict[str, Any] = optimizer.state_dict()
    state["param_groups"][0]["lr"] = rate
    return state


def training_file(path: Path, state: State, **options: Any) -> None:
    content = {"epoch": 3, "step": 17, "name": "run", "state_dict": state, "optimizer": optimizer_state(0.5)}
    torch.save(content, path, **options)


def transformers_names(state: State) -> State:
    """The inverse of the translation for two-layer models, written out by hand."""
    theirs: State = {}
    simple = {
        "logit_scale": "logit_scale",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
        "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
        "visual.ln_post.weight": "vision_model.post_layernorm.weight",
        "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    }
    blocks = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
        "attn.out_proj": "self_attn.out_proj",
    }
    for number in range(2):
        for ours, name in blocks.items():
            for kind in ("weight", "bias"):
                block = f"vision_model.encoder.layers.{number}.{name}.{kind}"
                simple[f"visual.transformer.resblocks.{number}.{ours}.{kind}"] = block
        for kind in ("weight", "bias"):
            joined = state[f"visual.transformer.resblocks.{number}.attn.in_proj_{kind}"]
            for letter, part in zip("qkv", joined.chunk(3), strict=True):
                theirs[f"vision_model.encoder.layers.{number}.self_attn.{letter}_proj.{kind}"] = part.clone()
    theirs |= {name: state[ours] for ours, name in simple.items()}
    theirs["visual_projection.weight"] = state["visual.proj"].T.contiguous()
    theirs["text_projection.weight"] = state["text_projection"].T.contiguous()
    bert = {key: value for key, value in state.items() if key.startswith("bert.")}
    theirs |= {f"text_model.{key.removeprefix('bert.')}": value for key, value in bert.items()}
    theirs["text_model.embeddings.position_ids"] = torch.arange(512)[None]
    theirs["text_model.pooler.dense.bias"] = torch.zeros(64)
    return theirs


def save_plain(path: Path, state: State) -> None:
    torch.save({"state_dict": state}, path)


def save_bare(path: Path, state: State) -> None:
    torch.save(OrderedDict(state), path)


def save_legacy(path: Path, state: State) -> None:
    training_file(path, prefixed(state), _use_new_zipfile_serialization=False)


def save_numpy_rate(path: Path, state: State) -> None:
    # The cosine schedule of the reference leaves numpy numbers in the optimizer.
    torch.save({"state_dict": prefixed(state), "optimizer": optimizer_state(np.float64(0.5))}, path)


def save_folder(path: Path, state: State) -> None:
    path.mkdir()
    save_file(transformers_names(state), path / "model.safetensors")


def save_old_folder(path: Path, state: State) -> None:
    path.mkdir()
    torch.save(transformers_names(state), path / "pytorch_model.bin")


def save_sharded_folder(path: Path, state: State) -> None:
    path.mkdir()
    names = transformers_names(state)
    weight_map = {key: f"model-{number % 2}.safetensors" for number, key in enumerate(names)}
    for shard in set(weight_map.values()):
        save_file({key: value for key, value in names.items() if weight_map[key] == shard}, path / shard)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


SPELLINGS: dict[str, Callable[[Path, State], None]] = {
    "plain.pt": save_plain,
    "bare.pt": save_bare,
    "bare_with_pooler.pt": lambda path, state: save_bare(path, with_rest(state)),
    "training.pt": lambda path, state: training_file(path, prefixed(state)),
    "training_with_pooler.pt": lambda path, state: training_file(path, prefixed(with_rest(state))),
    "fused.pt": lambda path, state: training_file(path, prefixed(fused(state, "visual.", "bert."))),
    "fused_visual.pt": lambda path, state: save_plain(path, fused(state, "visual.")),
    "fused_bert.pt": lambda path, state: save_plain(path, fused(state, "bert.")),
    "legacy.pt": save_legacy,
    "numpy_rate.pt": save_numpy_rate,
    "tensors.safetensors": lambda path, state: save_file(with_rest(state), path),
    "folder": save_folder,
    "old_folder": save_old_folder,
    "sharded_folder": save_sharded_folder,
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_reads_to_the_same_tensors(tmp_path: Path, name: str) -> None:
    state = state_of()
    SPELLINGS[name](tmp_path / name, state)
    read = read_checkpoint(tmp_path / name)
    assert read.path == tmp_path / name
    assert read.state_dict.keys() == state.keys()
    assert [key for key in state if not torch.equal(read.state_dict[key], state[key])] == []


@pytest.mark.parametrize("name", ["training.pt", "legacy.pt"])
def test_resnet_files_read_to_the_same_tensors(tmp_path: Path, name: str) -> None:
    state = state_of("resnet")
    SPELLINGS[name](tmp_path / name, state)
    read = read_checkpoint(tmp_path / name).state_dict
    assert read.keys() == state.keys()
    assert all(torch.equal(read[key], state[key]) for key in state)


@pytest.mark.parametrize("rate", [0.5, np.float64(0.5), np.float32(0.5)])
def test_the_rest_of_a_training_checkpoint_is_kept(tmp_path: Path, rate: Any) -> None:
    content = {"epoch": 3, "step": 17, "name": "run", "state_dict": state_of(), "optimizer": optimizer_state(rate)}
    torch.save(content, tmp_path / "epoch3.pt")
    read = read_checkpoint(tmp_path / "epoch3.pt")
    assert (read.epoch, read.step, read.extra) == (3, 17, {"name": "run"})
    assert read.optimizer is not None
    assert read.optimizer["param_groups"][0]["lr"] == 0.5
    assert torch.equal(read.optimizer["state"][0]["step"], torch.tensor(1.0))


def test_numpy_numbers_spelled_as_numpy_1_does_are_read(tmp_path: Path) -> None:
    path = tmp_path / "numpy1.pt"
    torch.save({"state_dict": {"a": torch.ones(1)}, "optimizer": {"lr": np.float64(0.25)}}, path)
    # Names of equal length keep the archive whole; checksums are not what is tested here.
    content = path.read_bytes()
    assert b"numpy._core.multiarray\nscalar" in content
    legacy = tmp_path / "legacy.pt"
    torch.save(
        {"state_dict": {"a": torch.ones(1)}, "optimizer": {"lr": np.float64(0.25)}},
        legacy,
        _use_new_zipfile_serialization=False,
    )
    renamed = legacy.read_bytes().replace(b"numpy._core.multiarray\nscalar", b"numpy.core.multiarray\nscalar")
    legacy.write_bytes(renamed)
    optimizer = read_checkpoint(legacy).optimizer
    assert optimizer == {"lr": 0.25}


def test_a_half_precision_file_gives_the_same_values_in_float32(tmp_path: Path) -> None:
    half = {key: value.half() if value.is_floating_point() else value for key, value in state_of("resnet").items()}
    save_plain(tmp_path / "half.pt", half)
    model, _ = open_model(tmp_path / "half.pt")
    loaded = model.state_dict()
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert loaded["visual.bn1.num_batches_tracked"].dtype == torch.int64
    assert all(torch.equal(loaded[key], half[key].to(loaded[key].dtype)) for key in half)


def test_not_a_number_is_a_number_like_any_other(tmp_path: Path) -> None:
    state = state_of() | {"logit_scale": torch.tensor(float("nan"))}
    save_plain(tmp_path / "nan.pt", state)
    assert open_model(tmp_path / "nan.pt")[0].logit_scale.isnan()


def test_changing_a_loaded_model_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    save_plain(tmp_path / "model.pt", state_of())
    before = (tmp_path / "model.pt").read_bytes()
    model, _ = open_model(tmp_path / "model.pt")
    with torch.no_grad():
        model.text_projection.zero_()
    assert (tmp_path / "model.pt").read_bytes() == before


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_read_from_its_file_computes_the_same_features(tmp_path: Path, kind: str) -> None:
    model = tiny_model(kind)
    training_file(tmp_path / "model.pt", prefixed(dict(model.state_dict())))
    loaded, _ = open_model(tmp_path / "model.pt")
    pixels = tiny_pixels(model)
    with torch.inference_mode():
        assert torch.equal(loaded.encode_image(pixels), model.encode_image(pixels))
        assert torch.equal(loaded.encode_text(TOKENS), model.encode_text(TOKENS))


# --- position embeddings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), [(4, 2), (4, 7), (3, 8)])
def test_resized_position_embeddings_are_those_of_the_reference(old: int, new: int) -> None:
    position = torch.from_numpy(weight(f"visual.positional_embedding.{old}", (old**2 + 1, 8)))
    golden = np.load(GOLDEN / "position_embedding.npz")[f"{old}-{new}"]
    np.testing.assert_allclose(resize_position_embedding(position, new).numpy(), golden, rtol=0, atol=1e-7)


def test_a_position_embedding_of_the_right_size_is_left_alone() -> None:
    position = torch.randn(17, 8)
    assert resize_position_embedding(position, 4) is position


@pytest.mark.parametrize("kind", CONFIGS)
def test_another_resolution_resizes_the_position_embedding_and_nothing_else(tmp_path: Path, kind: str) -> None:
    state = state_of(kind)
    save_plain(tmp_path / "model.pt", state)
    model, _ = open_model(tmp_path / "model.pt", resolution=96)
    key = "visual.positional_embedding" if kind == "vit" else "visual.attnpool.positional_embedding"
    side = 96 // (8 if kind == "vit" else 32)
    assert model.resolution == 96
    loaded = model.state_dict()
    assert torch.equal(loaded[key], resize_position_embedding(state[key], side))
    assert all(torch.equal(loaded[name], state[name]) for name in state if name != key)
    assert model.encode_image(tiny_pixels(model)).shape == (3, 24)


# --- architecture -----------------------------------------------------------------------------------------------------


def meta_checkpoint(config: zoo.ModelConfig) -> Checkpoint:
    with torch.device("meta"):
        return Checkpoint(Path("some.pt"), dict(CLIP.from_config(config).state_dict()))


@pytest.mark.parametrize("vision", PUBLISHED_PAIRS)
def test_the_architecture_of_published_models_is_read_off_their_tensors(vision: str) -> None:
    config = zoo.model_config(vision, PUBLISHED_PAIRS[vision])
    assert infer_config(meta_checkpoint(config)) == config


@pytest.mark.parametrize("text", ["RoBERTa-wwm-ext-base-chinese", "RoBERTa-wwm-ext-large-chinese", "RBT3-chinese"])
@pytest.mark.parametrize("vision", ["ViT-B-32", "ViT-H-14", "RN50"])
def test_the_architecture_of_any_pair_is_read_off_its_tensors(vision: str, text: str) -> None:
    config = zoo.model_config(vision, text)
    assert infer_config(meta_checkpoint(config)) == config


@pytest.mark.parametrize("vision", ["ViT-Tiny-64", "RN-Tiny-64"])
def test_the_architecture_of_the_small_models_is_read_off_their_tensors(vision: str) -> None:
    config = zoo.model_config(vision, "BERT-Tiny-chinese")
    assert infer_config(meta_checkpoint(config)) == config


def test_the_head_widths_of_the_huge_model_are_80_and_64() -> None:
    config = infer_config(meta_checkpoint(zoo.model_config("ViT-H-14", "RoBERTa-wwm-ext-large-chinese")))
    assert (config.vision.vision_head_width, config.text.text_num_attention_heads) == (80, 16)


def test_a_vocabulary_of_another_size_is_read_off_the_tensors(tmp_path: Path) -> None:
    model = CLIP.from_config(replace(CONFIGS["vit"], text=replace(TEXT, vocab_size=77)))
    save_plain(tmp_path / "model.pt", dict(model.state_dict()))
    loaded, _ = open_model(tmp_path / "model.pt")
    assert loaded.config.text.vocab_size == 77


def test_a_width_that_leaves_the_heads_open_is_refused_with_the_next_step() -> None:
    config = replace(CONFIGS["vit"], vision=replace(VIT, vision_width=48, vision_head_width=16))
    with pytest.raises(CheckpointError, match=r"some\.pt: .*48 wide.*name the two towers\)$"):
        infer_config(meta_checkpoint(config))


def test_a_file_without_a_chinese_text_tower_is_refused() -> None:
    tensors = {key: value for key, value in state_of().items() if not key.startswith("bert.")}
    with pytest.raises(
        CheckpointError, match=r"^openai\.pt: no Chinese text tower .* as `cn-clip train --clip-weight-path` does$"
    ):
        infer_config(Checkpoint(Path("openai.pt"), tensors))


def test_a_file_without_a_picture_tower_is_refused() -> None:
    tensors = {key: value for key, value in state_of().items() if key.startswith("bert.")}
    with pytest.raises(CheckpointError, match=r"^bert\.bin: no picture tower"):
        infer_config(Checkpoint(Path("bert.bin"), tensors))


# --- refusals ---------------------------------------------------------------------------------------------------------


class Trap:
    """Makes the folder it is given when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def refusal(path: Path) -> str:
    """What is said about the file: one line that begins with its path."""
    with pytest.raises(CheckpointError) as caught:
        open_model(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert len(message) < len(str(path)) + 250
    return message.removeprefix(str(path))


@pytest.mark.parametrize("name", ["model.pt", "model.bin", "model.safetensors", "folder/model.safetensors"])
@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_files_of_other_kinds_are_refused_with_the_next_step(tmp_path: Path, name: str, kind: str) -> None:
    content, said = OTHER_KINDS[kind]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    message = refusal(path.parent if name.startswith("folder") else path)
    assert message.removeprefix("/model.safetensors").startswith(f": {said}")


@pytest.mark.parametrize("content", [bytes(range(1, 256)) * 20, pickle.dumps([1, 2])])
def test_files_that_are_no_checkpoint_are_refused(tmp_path: Path, content: bytes) -> None:
    for name in ("model.pt", "model.safetensors"):
        (tmp_path / name).write_bytes(content)
        expected = "not a PyTorch checkpoint" if name.endswith(".pt") else "not a safetensors file"
        assert refusal(tmp_path / name).startswith(f": {expected}")


@pytest.mark.parametrize("name", ["plain.pt", "tensors.safetensors"])
def test_the_content_of_a_file_says_its_format_and_not_its_name(tmp_path: Path, name: str) -> None:
    SPELLINGS[name](tmp_path / name, state_of())
    for suffix in (".pth", ".ckpt", ".bin", ""):
        path = (tmp_path / name).rename(tmp_path / f"model{suffix}")
        assert open_model(path)[0].resolution == 32
        path.rename(tmp_path / name)


def test_a_file_of_torch_named_safetensors_is_told(tmp_path: Path) -> None:
    save_plain(tmp_path / "model.safetensors", state_of())
    assert refusal(tmp_path / "model.safetensors") == ": is a file of torch.save; rename it to .pt"


def test_one_of_several_files_and_their_index_name_the_folder(tmp_path: Path) -> None:
    save_sharded_folder(tmp_path / "folder", state_of())
    shard = tmp_path / "folder" / "model-00001-of-00002.safetensors"
    (tmp_path / "folder" / "model-0.safetensors").rename(shard)
    assert refusal(shard) == f": is one of several files of a model; give their folder, {tmp_path / 'folder'}"
    index = tmp_path / "folder" / "model.safetensors.index.json"
    assert refusal(index) == ": is the index of a model in several files; give their folder"


def test_a_folder_of_checkpoints_names_one(tmp_path: Path) -> None:
    save_plain(tmp_path / "epoch1.pt", state_of())
    assert refusal(tmp_path).endswith("expected a transformers folder or a file, such as epoch1.pt in it")


# --- names that wrappers and larger models give

WRAPPERS = [
    "module.",
    "model.",
    "_orig_mod.",
    "clip_model.",
    "net.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "model.clip_model._orig_mod.",
    "module.module.",
    "student.",
]


@pytest.mark.parametrize("convert", [lambda state: state, transformers_names])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_are_read_through_any_wrapper(tmp_path: Path, wrapper: str, convert: Callable[[State], State]) -> None:
    state = state_of()
    save_plain(tmp_path / "wrapped.pt", {wrapper + key: value for key, value in convert(state).items()})
    read = read_checkpoint(tmp_path / "wrapped.pt").state_dict
    assert read.keys() == state.keys()
    assert all(torch.equal(read[key], value) for key, value in state.items())


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."])
@pytest.mark.parametrize("at", ["visual.", "bert.", "visual.transformer.resblocks.0.", "bert.encoder.layer.1."])
def test_names_are_read_where_only_a_part_was_wrapped(tmp_path: Path, wrapper: str, at: str) -> None:
    state = state_of()
    save_plain(tmp_path / "wrapped.pt", {key.replace(at, at + wrapper): value for key, value in state.items()})
    assert read_checkpoint(tmp_path / "wrapped.pt").state_dict.keys() == state.keys()


def test_towers_in_two_places_are_read(tmp_path: Path) -> None:
    state = state_of()
    parts = {"visual.": "image_encoder.visual.", "bert.": "text_encoder.model.bert."}
    for part, name in parts.items():
        state = {key.replace(part, name) if key.startswith(part) else key: value for key, value in state.items()}
    save_plain(tmp_path / "towers.pt", state)
    assert read_checkpoint(tmp_path / "towers.pt").state_dict.keys() == state_of().keys()


def test_two_models_in_one_dictionary_are_told_apart_and_none_is_guessed(tmp_path: Path) -> None:
    state = state_of()
    both = {f"{name}.{key}": value for name in ("student", "teacher") for key, value in state.items()}
    save_plain(tmp_path / "both.pt", both)
    assert refusal(tmp_path / "both.pt").startswith(": holds several models, under 'student.' and 'teacher.'; save the")


@pytest.mark.parametrize("rest", [{}, {"epoch": "last", "optimizer_state_dict": {"state": {0: {"m": torch.ones(2)}}}}])
@pytest.mark.parametrize("name", ["model", "model_state_dict", "net", "module", "weights", "checkpoint.model"])
def test_a_dictionary_of_weights_is_read_under_any_name(tmp_path: Path, name: str, rest: dict[str, Any]) -> None:
    state = state_of()
    outer, _, inner = name.partition(".")
    content = {outer: {inner: prefixed(state)} if inner else prefixed(state), "loss": torch.tensor(0.5), **rest}
    torch.save(content, tmp_path / "run.pt")
    read = read_checkpoint(tmp_path / "run.pt")
    assert (read.epoch, read.optimizer, read.state_dict.keys()) == (0, None, state.keys())


def test_a_file_of_lightning_is_read(tmp_path: Path) -> None:
    state = {f"model.{key}": value for key, value in state_of().items()}
    content = {"epoch": 2, "global_step": 9, "pytorch-lightning_version": "2.5", "state_dict": state, "callbacks": {}}
    torch.save(content, tmp_path / "last.ckpt")
    assert read_checkpoint(tmp_path / "last.ckpt").state_dict.keys() == state_of().keys()
    assert open_model(tmp_path / "last.ckpt")[0].resolution == 32


def test_two_dictionaries_of_weights_are_named_and_none_is_guessed(tmp_path: Path) -> None:
    torch.save({"model": state_of(), "ema": state_of()}, tmp_path / "run.pt")
    assert refusal(tmp_path / "run.pt").startswith(": holds the models model and ema; save the one you want by itself")


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
@pytest.mark.parametrize("name", ["plain.pt", "legacy.pt", "tensors.safetensors"])
def test_truncated_files_are_refused(tmp_path: Path, name: str, share: float) -> None:
    path = tmp_path / name
    SPELLINGS[name](path, state_of())
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    refusal(path)


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path: Path, is_zip: bool, nested: bool) -> None:
    trap = Trap(tmp_path / "sprung")
    content = {"state_dict": state_of(), "optimizer": {"lr": trap}} if nested else trap
    torch.save(content, tmp_path / "trap.pt", _use_new_zipfile_serialization=is_zip)
    assert refusal(tmp_path / "trap.pt").startswith(": refused, because loading it would run code (posix.mkdir)")
    assert not (tmp_path / "sprung").exists()


def test_a_plain_pickle_that_would_run_code_runs_none(tmp_path: Path) -> None:
    (tmp_path / "trap.pt").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    refusal(tmp_path / "trap.pt")
    assert not (tmp_path / "sprung").exists()


def test_a_whole_pickled_model_is_refused_by_its_class(tmp_path: Path) -> None:
    torch.save(tiny_model(), tmp_path / "model.pt")
    said = refusal(tmp_path / "model.pt")
    assert "cn_clip.clip.model.CLIP" in said
    assert said.endswith("where it was made, save torch.save(model.state_dict(), path)")


def test_a_missing_file_says_which_names_there_are(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"Model .*gone\.pt not found; available models = \['ViT-B-16'"):
        open_model(tmp_path / "gone.pt")


def test_a_folder_without_weights_says_what_was_looked_for(tmp_path: Path) -> None:
    assert "model.safetensors or pytorch_model.bin" in refusal(tmp_path)


def test_a_folder_with_a_missing_shard_names_it(tmp_path: Path) -> None:
    save_sharded_folder(tmp_path / "folder", state_of())
    (tmp_path / "folder" / "model-1.safetensors").unlink()
    assert refusal(tmp_path / "folder").startswith("/model-1.safetensors: no such file")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([torch.ones(1)], "holds a list, expected a dictionary of tensors"),
        (torch.ones(1), "holds a Tensor, expected a dictionary of tensors"),
        ({}, "holds no tensors"),
        ({"state_dict": {}}, "holds no tensors"),
        ({"state_dict": {"a": 1}}, "holds no tensors"),
        ({"weights": torch.ones(1)}, "no picture tower"),
        ({"state_dict": {"a": torch.ones(1).expand(10**6, 10**6)}}, "a holds fewer values than its shape"),
        ({"a": torch.ones(2), "b": torch.ones(3, 1).expand(3, 2)}, "b holds fewer values than its shape (3, 2)"),
        ({"a": torch.eye(2).to_sparse()}, "a holds fewer values than its shape"),
        ({"a": torch.ones(2, device="meta")}, "a holds fewer values than its shape"),
        ({"state_dict": {"a": torch.ones(1)}, "epoch": "last"}, "epoch is a str, expected an integer"),
        ({"state_dict": {"a": torch.ones(1)}, "optimizer": [1]}, "optimizer is a list, expected a dictionary"),
    ],
)
def test_files_that_hold_something_else_say_what(tmp_path: Path, content: Any, said: str) -> None:
    torch.save(content, tmp_path / "other.pt")
    assert refusal(tmp_path / "other.pt").startswith(f": {said}")


def changed(key: str, value: torch.Tensor | None, kind: str = "vit") -> State:
    state = state_of(kind)
    if value is None:
        del state[key]
    else:
        state[key] = value
    return state


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (changed("visual.ln_pre.weight", None), "the tensor visual.ln_pre.weight is missing"),
        (changed("visual.proj", None), "the tensor visual.proj is missing"),
        (changed("visual.attnpool.c_proj.weight", None, "resnet"), "the tensor visual.attnpool.c_proj.weight is miss"),
        (changed("bert.encoder.layer.0.output.dense.bias", None), "the tensor bert.encoder.layer.0.output.dense.bias"),
        (changed("bert.extra.weight", torch.ones(1)), "unexpected tensor bert.extra.weight"),
        (changed("bert.encoder.layer.7.output.dense.bias", torch.ones(64)), "the tensor bert.encoder.layer.2."),
        (changed("visual.ln_pre.weight", torch.ones(65)), "visual.ln_pre.weight has shape (65,), expected (64,)"),
        (changed("text_projection", torch.ones(64, 9)), "text_projection has shape (64, 9), expected (64, 24)"),
        (changed("visual.positional_embedding", torch.ones(17, 5)), "visual.positional_embedding has shape (17, 5)"),
        (changed("visual.positional_embedding", torch.ones(16, 64)), "visual.positional_embedding: 16 rows are not"),
        (changed("visual.positional_embedding", torch.ones(0, 64)), "of no known architecture"),
        (changed("visual.positional_embedding", torch.tensor(1.0)), "of no known architecture"),
        (changed("visual.conv1.weight", torch.ones(64, 3)), "of no known architecture"),
        (changed("bert.encoder.layer.1.attention.self.Wqkv.weight", torch.ones(4, 64)), "the attention weights"),
        (changed("vision_model.embeddings.patch_embedding.weight", torch.ones(1)), "of no known architecture"),
    ],
)
def test_tensors_of_another_model_are_refused_with_the_first_difference(
    tmp_path: Path, state: State, said: str
) -> None:
    save_plain(tmp_path / "other.pt", state)
    assert said in refusal(tmp_path / "other.pt")


def test_names_that_do_not_fit_the_tensors_are_refused(tmp_path: Path) -> None:
    save_plain(tmp_path / "model.pt", state_of())
    with pytest.raises(CheckpointError, match=r"model\.pt: .* has shape .* is it another architecture\?$"):
        open_model(tmp_path / "model.pt", vision="ViT-Tiny-64", text="BERT-Tiny-chinese")


@pytest.fixture(scope="module")
def valid_files(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("valid")
    contents = []
    for name in ("plain.pt", "legacy.pt"):
        SPELLINGS[name](folder / name, {"logit_scale": torch.ones(3), "a": torch.arange(4)})
        contents.append((folder / name).read_bytes())
    return contents


@given(data=st.data())
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_with_changed_bytes_is_read_or_refused(
    tmp_path: Path, valid_files: list[bytes], data: st.DataObject
) -> None:
    content = bytearray(valid_files[data.draw(st.integers(0, 1))])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "changed.pt"
    path.write_bytes(content)
    try:
        read = read_checkpoint(path)
    except CheckpointError as error:
        assert str(error).startswith(str(path))  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert all(isinstance(value, torch.Tensor) for value in read.state_dict.values())


def test_fit_returns_exactly_what_the_model_needs() -> None:
    state = state_of()
    assert fit(state, state, Path("x")) == state
    assert build(CONFIGS["vit"], Checkpoint(Path("x"), state)).training is False


# --- the two spellings of attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("kind", CONFIGS)
def test_converting_twice_gives_the_same_tensors(kind: str, prefix: str) -> None:
    state = {prefix + key: value for key, value in state_of(kind).items()}
    original = dict(state)
    once = convert_state_dict(state)
    assert once is state
    assert once.keys() != original.keys()
    twice = convert_state_dict(dict(once))
    assert all(key.startswith(prefix) for key in once)
    assert twice.keys() == original.keys()
    assert all(torch.equal(twice[key], original[key]) for key in original)


@pytest.mark.parametrize("vision", ["ViT-B-16", "RN50"])
def test_the_converted_names_are_those_of_the_reference(vision: str) -> None:
    names = json.loads(gzip.decompress((GOLDEN / "parameter_names.json.gz").read_bytes()))[vision]["state_dict"]
    golden = json.loads(gzip.decompress((GOLDEN / "weights.json.gz").read_bytes()))[vision]["fused"]
    state = {name: torch.empty(shape, device="meta") for name, shape in names}
    assert sorted(convert_state_dict(state)) == golden


def test_fused_rows_are_query_then_key_then_value() -> None:
    state = state_of()
    layer = "bert.encoder.layer.1.attention.self"
    fused_rows = convert_state_dict(dict(state))[f"{layer}.Wqkv.weight"]
    assert torch.equal(fused_rows, torch.cat([state[f"{layer}.{part}.weight"] for part in ("query", "key", "value")]))


def test_converting_nothing_gives_nothing() -> None:
    assert convert_state_dict({}) == {}


def test_a_copied_file_gives_the_same_model(tmp_path: Path) -> None:
    save_plain(tmp_path / "a.pt", state_of())
    shutil.copy(tmp_path / "a.pt", tmp_path / "名字 带空格.pth")
    assert open_model(tmp_path / "名字 带空格.pth")[0].resolution == 32


# --- adapters

ADAPTED = {
    "a.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    "a.lora_A.weight": torch.tensor([[1.0, -1.0]]),
    "a.lora_B.weight": torch.tensor([[2.0], [3.0]]),
    "x.attn.in_proj_weight": torch.zeros(3, 1),
    "x.attn.in_proj.lora_A.weight": torch.tensor([[2.0]]),
    "x.attn.in_proj.lora_B.weight": torch.tensor([[1.0], [2.0], [3.0]]),
    "c.weight": torch.zeros(1, 1, 2, 2),
    "c.lora_A.weight": torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]),
    "c.lora_B.weight": torch.tensor([[[[10.0]]]]),
}


def adapted_file(path: Path, *, lora: Any = None, **changes: torch.Tensor | None) -> Path:
    state = {f"module.{key}": value for key, value in (ADAPTED | changes).items() if value is not None}
    torch.save(
        {"epoch": 1, "step": 2, "name": "run", "state_dict": state, "lora": lora or {"rank": 1, "alpha": 2}}, path
    )
    return path


def test_adapters_are_added_to_linear_joined_and_convolution_weights(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(adapted_file(tmp_path / "run.pt"))
    # alpha / rank = 2, times B A = [[2, -2], [3, -3]]
    assert {name: value.tolist() for name, value in checkpoint.state_dict.items()} == {
        "a.weight": [[5.0, -2.0], [9.0, -2.0]],
        "x.attn.in_proj_weight": [[4.0], [8.0], [12.0]],
        "c.weight": [[[[20.0, 40.0], [60.0, 80.0]]]],
    }


def test_adapters_stand_apart_when_asked(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(adapted_file(tmp_path / "run.pt"), merge_lora=False)
    assert checkpoint.lora == LowRank(1, 2.0)
    assert checkpoint.state_dict.keys() == ADAPTED.keys()
    assert all(torch.equal(value, ADAPTED[key]) for key, value in checkpoint.state_dict.items())


def test_adapters_are_added_in_float32_and_the_weight_keeps_its_type() -> None:
    # The product 1 + 2**-11 is no float16: it would be rounded to 1, and so would be 1 + 2**-11 as the sum.
    tensors = {
        "a.weight": torch.full((1, 1), 2.0**-11, dtype=torch.float16),
        "a.lora_A.weight": torch.tensor([[1.0], [2.0**-11]], dtype=torch.float16),
        "a.lora_B.weight": torch.ones(1, 2, dtype=torch.float16),
    }
    merged = merge(tensors, LowRank(2, 2.0))["a.weight"]
    assert merged.dtype is torch.float16
    assert merged.item() == 1 + 2.0**-10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a.lora_A.weight": None}, "the adapter a lacks its lora_A, its lora_B or the weight it adapts"),
        ({"a.lora_B.weight": None}, "the adapter a lacks"),
        ({"a.weight": None}, "the adapter a lacks"),
        ({"a.weight": torch.ones(3, 2)}, r"the adapter a has shapes \(1, 2\) and \(2, 1\) for a weight of \(3, 2\)"),
        ({"a.weight": torch.ones(2)}, "the adapter a has shapes"),
        ({"lora": {"rank": 3, "alpha": 2}}, "which do not fit at rank 3"),
        ({"lora": {"rank": 0, "alpha": 2}}, 'the entry "lora" is'),
        ({"lora": {"rank": 1, "alpha": float("nan")}}, 'the entry "lora" is'),
        ({"lora": {"rank": 1}}, 'the entry "lora" is'),
        ({"lora": [1, 2]}, 'the entry "lora" is'),
    ],
)
def test_adapters_that_do_not_fit_are_refused_with_the_file_and_the_reason(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = adapted_file(tmp_path / "run.pt", **changes)
    with pytest.raises(CheckpointError, match=rf"run\.pt: {message}" if "which" not in message else message):
        read_checkpoint(path)


def test_the_bias_of_the_sigmoid_loss_is_left_out_of_a_model_without_it(tmp_path: Path) -> None:
    training_file(tmp_path / "run.pt", prefixed(state_of() | {"logit_bias": torch.tensor(-10.0)}))
    model, checkpoint = open_model(tmp_path / "run.pt")
    assert "logit_bias" in checkpoint.state_dict
    assert model.state_dict().keys() == state_of().keys()


@pytest.mark.parametrize("name", ["hf:google/siglip", "open_clip:ViT-B-32@openai"])
def test_names_of_other_families_are_told_apart_from_files(name: str) -> None:
    for read in (read_checkpoint, lambda name: find_weights("--resume", name)):
        with pytest.raises(CheckpointError, match="only Chinese-CLIP is taken here; other families are taken by"):
            read(name)


def test_a_name_that_is_too_long_is_no_file() -> None:
    for read in (read_checkpoint, lambda name: find_weights("--resume", name)):
        with pytest.raises(CheckpointError, match="no such file"):
            read("x" * 300)
