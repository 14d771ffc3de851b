"""OpenAI's archives (TorchScript) are read without running their code, and initialise the picture tower."""

import logging
import os
import pickle
import re
import subprocess
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import warm_python
from tiny_models import CONFIGS, TEXT, tiny_model
from torch import Tensor, nn

from cn_clip.clip import load
from cn_clip.clip.layers import LayerNorm, QuickGELU
from cn_clip.clip.model import CLIP
from cn_clip.clip.visual import VisualTransformer
from cn_clip.clip.weights.checkpoint import infer_config, read_checkpoint, read_openai_archive
from cn_clip.errors import CheckpointError

WIDTH, LAYERS, RESOLUTION, PATCH, EMBED = 64, 2, 32, 8, 24


class Block(nn.Module):
    """A block with OpenAI's parameter names; the text tower's carries its mask as a plain attribute."""

    def __init__(self, mask: Tensor | None) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 1)
        self.ln_1 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential()
        for name, layer in (
            ("c_fc", nn.Linear(WIDTH, 4 * WIDTH)),
            ("gelu", QuickGELU()),
            ("c_proj", nn.Linear(4 * WIDTH, WIDTH)),
        ):
            self.mlp.add_module(name, layer)
        self.ln_2 = nn.LayerNorm(WIDTH)
        self.attn_mask = mask

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=self.attn_mask)[0]
        output: Tensor = x + self.mlp(self.ln_2(x))
        return output


class Transformer(nn.Module):
    def __init__(self, mask: Tensor | None) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*[Block(mask) for _ in range(LAYERS)])

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.resblocks(x)
        return output


class Visual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn((RESOLUTION // PATCH) ** 2 + 1, WIDTH))
        self.ln_pre = nn.LayerNorm(WIDTH)
        self.transformer = Transformer(None)
        self.ln_post = nn.LayerNorm(WIDTH)
        self.proj = nn.Parameter(torch.randn(WIDTH, EMBED))

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv1(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(x.shape[0], 1, -1), x], dim=1) + self.positional_embedding
        x = self.transformer(self.ln_pre(x).transpose(0, 1)).transpose(0, 1)
        output: Tensor = self.ln_post(x[:, 0]) @ self.proj
        return output


class OpenAIModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = Visual()
        self.transformer = Transformer(torch.full((7, 7), float("-inf")).triu(1))
        self.token_embedding = nn.Embedding(11, WIDTH)
        self.positional_embedding = nn.Parameter(torch.randn(7, WIDTH))
        self.ln_final = nn.LayerNorm(WIDTH)
        self.text_projection = nn.Parameter(torch.randn(WIDTH, EMBED))
        self.logit_scale = nn.Parameter(torch.tensor(4.25))
        for name, value in (("input_resolution", RESOLUTION), ("context_length", 7), ("vocab_size", 11)):
            self.register_buffer(name, torch.tensor(value))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        x = (self.token_embedding(text) + self.positional_embedding).transpose(0, 1)
        x = self.ln_final(self.transformer(x).transpose(0, 1))
        rows = x[:, -1] @ self.text_projection
        output: Tensor = self.logit_scale.exp() * self.visual(image) @ rows.t()
        return output


def halve(model: nn.Module) -> nn.Module:
    """As OpenAI converts: all but the normalisations in float16."""
    model.half()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    return model


def save_archive(path: Path, *, traced: bool) -> dict[str, Tensor]:
    """Writes the archive; returns what torch.jit.load finds in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(5)
        model = OpenAIModel().eval()
        example = (torch.zeros(1, 3, RESOLUTION, RESOLUTION), torch.zeros(1, 7, dtype=torch.long))
        archive = torch.jit.trace(model, example, check_trace=False) if traced else torch.jit.script(model)
        halve(archive)
        torch.jit.save(archive, str(path))
        state: dict[str, Tensor] = torch.jit.load(str(path), map_location="cpu").state_dict()
    return state


@pytest.fixture(scope="module", params=["traced", "scripted"])
def archive(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    path = tmp_path_factory.mktemp("openai") / "ViT-tiny.pt"
    return path, save_archive(path, traced=request.param == "traced")


def test_an_archive_reads_to_the_tensors_of_torch_jit_load(archive: tuple[Path, dict[str, Tensor]]) -> None:
    path, expected = archive
    read = read_openai_archive(path)
    assert list(read) == list(expected)
    assert {key: value.dtype for key, value in read.items()} == {key: value.dtype for key, value in expected.items()}
    assert all(torch.equal(read[key], expected[key]) for key in expected)
    assert read["visual.conv1.weight"].dtype == torch.float16
    assert "transformer.resblocks.0.attn_mask" not in read


def test_the_general_reader_knows_an_archive_and_says_what_it_is_good_for(
    archive: tuple[Path, dict[str, Tensor]],
) -> None:
    checkpoint = read_checkpoint(archive[0])
    assert checkpoint.state_dict.keys() == archive[1].keys()
    with pytest.raises(CheckpointError, match=r"no Chinese text tower \(bert\.\*\); an OpenAI CLIP file can only init"):
        infer_config(checkpoint)


def roberta(path: Path, *, tensorflow_names: bool) -> dict[str, Tensor]:
    """A masked language model's file with the tower of `tiny_model(seed=9)`; returns that tower."""
    tower = {key: value for key, value in tiny_model(seed=9).state_dict().items() if key.startswith("bert.")}
    content = dict(tower)
    if tensorflow_names:
        for ours, old in (("weight", "gamma"), ("bias", "beta")):
            content = {key.replace(f"LayerNorm.{ours}", f"LayerNorm.{old}"): v for key, v in content.items()}
    content |= {"bert.pooler.dense.bias": torch.ones(64), "bert.embeddings.position_ids": torch.arange(512)[None]}
    content |= {"cls.predictions.bias": torch.ones(40), "cls.seq_relationship.bias": torch.ones(2)}
    torch.save(content, path)
    return tower


@pytest.mark.parametrize("tensorflow_names", [True, False])
@pytest.mark.parametrize("as_state_dict", [True, False])
def test_load_initialises_both_towers_and_the_scale(
    tmp_path: Path, archive: tuple[Path, dict[str, Tensor]], as_state_dict: bool, tensorflow_names: bool
) -> None:
    clip_path, openai = archive
    if as_state_dict:
        clip_path = tmp_path / "ViT-tiny.state_dict.pt"
        torch.save(openai, clip_path)
    tower = roberta(tmp_path / "pytorch_model.bin", tensorflow_names=tensorflow_names)
    model = tiny_model(seed=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    loaded = load(model, device="cpu", clip_path=clip_path, bert_path=tmp_path / "pytorch_model.bin")
    state = loaded.state_dict()
    assert loaded is model
    assert not loaded.training
    assert loaded.logit_scale.item() == 4.25
    for key, value in state.items():
        if key.startswith("visual."):
            assert torch.equal(value, openai[key].float()), key
        elif key.startswith("bert."):
            assert torch.equal(value, tower[key]), key
    assert torch.equal(state["text_projection"], before["text_projection"])


def test_load_resizes_the_position_embedding(archive: tuple[Path, dict[str, Tensor]]) -> None:
    from dataclasses import replace

    config = CONFIGS["vit"]
    model = CLIP.from_config(replace(config, vision=replace(config.vision, image_resolution=64)))
    load(model, device="cpu", clip_path=archive[0])
    assert isinstance(model.visual, VisualTransformer)
    assert model.visual.positional_embedding.shape == (65, WIDTH)
    assert torch.equal(model.visual.positional_embedding[0], archive[1]["visual.positional_embedding"][0].float())


def test_the_initialised_picture_tower_computes_what_the_archive_computes(
    archive: tuple[Path, dict[str, Tensor]],
) -> None:
    reference = Visual().eval()
    reference.load_state_dict(
        {key.removeprefix("visual."): value for key, value in archive[1].items() if key.startswith("visual.")}
    )
    model = load(tiny_model(seed=1), device="cpu", clip_path=archive[0])
    pixels = torch.randn(2, 3, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        torch.testing.assert_close(model.encode_image(pixels), reference(pixels), atol=1e-4, rtol=1e-4)


def test_load_says_which_file_has_nothing_for_its_tower(tmp_path: Path) -> None:
    roberta(tmp_path / "bert.bin", tensorflow_names=False)
    with pytest.raises(CheckpointError, match=r"bert\.bin: holds no tensor named visual\. or logit_scale"):
        load(tiny_model(), device="cpu", clip_path=tmp_path / "bert.bin")


def test_load_names_the_file_whose_shapes_differ(tmp_path: Path, archive: tuple[Path, dict[str, Tensor]]) -> None:
    torch.save({"bert.embeddings.word_embeddings.weight": torch.ones(41, 64)}, tmp_path / "bert.bin")
    with pytest.raises(CheckpointError, match=r"bert\.bin: bert\.embeddings\.word_embeddings\.weight has shape \(41,"):
        load(tiny_model(), device="cpu", clip_path=archive[0], bert_path=tmp_path / "bert.bin")


def test_load_warns_of_layers_the_model_does_not_have(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tower = roberta(tmp_path / "bert.bin", tensorflow_names=False)
    tower["bert.encoder.layer.2.output.dense.bias"] = torch.ones(TEXT.text_hidden_size)
    torch.save(tower, tmp_path / "bert.bin")
    with caplog.at_level(logging.WARNING):
        load(tiny_model(), device="cpu", bert_path=tmp_path / "bert.bin")
    assert "1 tensors have no place in this model, e.g. bert.encoder.layer.2.output.dense.bias" in caplog.text


# --- refusals ---------------------------------------------------------------------------------------------------------


class Trap:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


# --- the command ------------------------------------------------------------------------------------------------------


def run_transform(*args: object) -> "subprocess.CompletedProcess[str]":
    root = Path(__file__).resolve().parent.parent
    command = [warm_python.program(), "cn_clip/preprocess/transform_openai_pretrain_weights.py", *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


def test_the_transform_command_writes_the_state_dict_beside_the_archive(
    tmp_path: Path, archive: tuple[Path, dict[str, Tensor]]
) -> None:
    raw = tmp_path / "ViT-B-16.pt"
    raw.write_bytes(archive[0].read_bytes())
    result = run_transform("--raw-ckpt-path", raw)
    target = tmp_path / "ViT-B-16.state_dict.pt"
    assert result.stdout.splitlines()[-2:] == [f"Transformed openai ckpt {raw} to {target}!", "Done!"]
    written = torch.load(target, weights_only=True)
    assert written.keys() == archive[1].keys()
    assert all(torch.equal(written[key], value) for key, value in archive[1].items())


def test_the_transform_command_refuses_other_files_and_leaves_nothing(tmp_path: Path) -> None:
    raw = tmp_path / "plain.pt"
    torch.save({"x": torch.zeros(1)}, raw)
    result = run_transform("--raw-ckpt-path", raw)
    assert result.returncode == 1
    assert f"{raw}: not a TorchScript archive" in result.stderr
    assert list(tmp_path.iterdir()) == [raw]


def rewrite(source: Path, target: Path, change: Callable[[str, bytes], bytes]) -> None:
    """Copies an archive, passing every member through `change`."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))


def test_an_archive_that_would_run_code_is_refused_and_runs_none(
    tmp_path: Path, archive: tuple[Path, dict[str, Tensor]]
) -> None:
    trap = pickle.dumps(Trap(tmp_path / "sprung"), protocol=2)
    path = tmp_path / "trap.pt"
    rewrite(archive[0], path, lambda name, content: trap if name.endswith("/data.pkl") else content)
    for read in (read_checkpoint, read_openai_archive):
        with pytest.raises(
            CheckpointError, match=rf"^{re.escape(str(path))}: refused, because .* run code \(posix\.mkdir\)$"
        ):
            read(path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("damage", ["pickle cut", "storage cut", "no pickle", "no storage", "not modules"])
def test_a_damaged_archive_is_refused(tmp_path: Path, archive: tuple[Path, dict[str, Tensor]], damage: str) -> None:
    path = tmp_path / "damaged.pt"

    def change(name: str, content: bytes) -> bytes:
        if name.endswith("/data.pkl"):
            return {"pickle cut": content[: len(content) // 2], "not modules": pickle.dumps([1])}.get(damage, content)
        return content[:1] if damage == "storage cut" and "/data/" in name else content

    rewrite(archive[0], path, change)
    if damage.startswith("no "):
        unwanted = "/data.pkl" if damage == "no pickle" else "/data/0"
        with zipfile.ZipFile(archive[0]) as old, zipfile.ZipFile(path, "w") as new:
            for name in old.namelist():
                if not name.endswith(unwanted):
                    new.writestr(name, old.read(name))
    with pytest.raises(CheckpointError, match=rf"^{re.escape(str(path))}: a damaged TorchScript archive"):
        read_openai_archive(path)


def test_a_plain_checkpoint_is_not_taken_for_an_archive(tmp_path: Path) -> None:
    torch.save(tiny_model().state_dict(), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"model\.pt: not a TorchScript archive; expected a file as OpenAI"):
        read_openai_archive(tmp_path / "model.pt")


def test_layer_norm_here_is_the_one_archives_hold() -> None:
    x = torch.randn(3, WIDTH)
    assert torch.equal(LayerNorm(WIDTH)(x), nn.LayerNorm(WIDTH)(x))
