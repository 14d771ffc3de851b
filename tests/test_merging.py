"""Token merging: which tokens are merged, what a tower makes of them, and vectors that never mix with others."""

import json
import math
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny_models import TEXT, VIT, tiny_model
from torch import Tensor, nn

from cn_clip import cli, emoji_pack, zoo
from cn_clip.clip import Encoder, marks, merge_rules
from cn_clip.clip.backends.exported import Source, tower_files
from cn_clip.clip.backends.names import BackendName
from cn_clip.clip.backends.opening import open_backend
from cn_clip.clip.backends.pytorch import TorchBackend
from cn_clip.clip.choice import Choice
from cn_clip.clip.layers import attention_scores
from cn_clip.clip.merging import merged
from cn_clip.clip.model import CLIP
from cn_clip.clip.opening import fingerprint, identity, open_quietly
from cn_clip.clip.visual import VisualTransformer
from cn_clip.command import Speaker
from cn_clip.errors import ConfigError
from cn_clip.retrieval.store import open_index
from cn_clip.zoo import ModelConfig, vision_config


def by_hand(x_LD: Tensor, sizes: list[float], keys_LD: Tensor, heads: int, count: int) -> tuple[Tensor, list[float]]:
    """The merge of one picture in loops, one pair at a time."""
    length, width = len(x_LD), keys_LD.shape[1] // heads
    keys = [sum(row[h * width : (h + 1) * width] for h in range(heads)) / heads for row in keys_LD.double()]
    first, second = range(2, length, 2), range(1, length, 2)

    def cosine(one: int, other: int) -> float:
        return float(keys[one] @ keys[other] / (keys[one].norm() * keys[other].norm()))

    partner = {one: max(second, key=lambda other: cosine(one, other)) for one in first}
    going = sorted(first, key=lambda one: -cosine(one, partner[one]))[:count]
    rows, numbers = [x_LD[0].double()], [sizes[0]]
    for one in first:
        if one not in going:
            rows.append(x_LD[one].double())
            numbers.append(sizes[one])
    for other in second:
        group = [other, *(one for one in going if partner[one] == other)]
        total = sum(sizes[one] for one in group)
        rows.append(sum(x_LD[one].double() * sizes[one] for one in group) / total)
        numbers.append(total)
    return torch.stack(rows), numbers


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(3, 23),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_merge_is_that_of_slow_loops(length: int, batch: int, heads: int, seed: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, (length - 1) // 2))
    generator = torch.Generator().manual_seed(seed)
    x_BLD, keys_BLD = (torch.randn(batch, length, heads * 4, generator=generator) for _ in range(2))
    sizes_BL = torch.randint(1, 9, (batch, length), generator=generator).float()
    tokens_BMD, left_BM = merged(x_BLD, sizes_BL, keys_BLD, heads, count)
    assert tokens_BMD.shape == (batch, length - count, heads * 4)
    for number in range(batch):
        rows, sizes = by_hand(x_BLD[number], sizes_BL[number].tolist(), keys_BLD[number], heads, count)
        # Means of up to 12 rows in float32.
        torch.testing.assert_close(tokens_BMD[number].double(), rows, atol=1e-5, rtol=1e-5)
        assert left_BM[number].tolist() == pytest.approx(sizes)


@settings(max_examples=30, deadline=None)
@given(length=st.integers(3, 30), seed=st.integers(0, 99), values=st.integers(1, 3), data=st.data())
def test_class_token_stays_first_and_no_patch_is_lost(length: int, seed: int, values: int, data: st.DataObject) -> None:
    """Also where keys are equal, or zero."""
    count = data.draw(st.integers(1, (length - 1) // 2))
    generator = torch.Generator().manual_seed(seed)
    x_BLD = torch.randn(2, length, 8, generator=generator)
    keys_BLD = torch.randint(0, values, (2, length, 8), generator=generator).float()
    tokens_BMD, sizes_BM = merged(x_BLD, None, keys_BLD, 2, count)
    assert torch.equal(tokens_BMD[:, 0], x_BLD[:, 0])
    assert torch.equal(sizes_BM[:, 0], torch.ones(2))
    assert sizes_BM.sum(dim=1).tolist() == [length, length]
    # The mean of all patches, each as often as it is in a token, is what it was.
    torch.testing.assert_close((tokens_BMD * sizes_BM[..., None]).sum(dim=1), x_BLD.sum(dim=1), atol=1e-4, rtol=1e-4)


def test_worked_example_of_the_docstring() -> None:
    keys = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.3, 1.0], [1.0, -2.0], [-1.0, -1.0], [0.3, 1.0]])[None]
    x = torch.arange(6.0).reshape(1, 6, 1)
    tokens, sizes = merged(x, None, keys, 1, 1)
    assert tokens[0, :, 0].tolist() == [0, 4, 1, 3, 3.5]
    assert sizes[0].tolist() == [1, 1, 1, 1, 2]


def test_plan_halves_what_is_there_and_spares_the_last_layer() -> None:
    assert merge_rules.plan(196, 12, 8) == (8,) * 11 + (0,)
    assert merge_rules.plan(7, 4, 2) == (2, 2, 1, 0)
    assert merge_rules.plan(7, 1, 2) == (0,)


def deep(layers: int = 4) -> CLIP:
    """A ViT of 64 patches, and a text tower that takes any character."""
    config = ModelConfig(
        replace(VIT, image_resolution=64, vision_layers=layers, vision_width=128), replace(TEXT, vocab_size=21128)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = CLIP.from_config(config)
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    return model.eval()


def pixels(count: int = 3) -> NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal((count, 3, 64, 64), dtype=np.float32)


def tower_by_hand(visual: VisualTransformer, picture: Tensor, merge_tokens: int) -> Tensor:
    """The embedding (E,) of one picture, all layers with all tokens, in float64."""
    patches = visual.conv1(picture[None]).flatten(2).transpose(1, 2)[0]
    x = visual.ln_pre(torch.cat([visual.class_embedding[None], patches]) + visual.positional_embedding)
    sizes = [1.0] * len(x)
    blocks = list(visual.transformer.resblocks)
    for number, block in enumerate(blocks):
        queries, keys, values = nn.functional.linear(
            block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias
        ).chunk(3, dim=-1)
        heads = block.attn.num_heads
        bias = torch.tensor([math.log(one) for one in sizes])[None, None, None]
        shares = attention_scores(queries[None], keys[None], heads, bias)
        context = shares @ values.unflatten(-1, (heads, -1)).transpose(0, 1)[None]
        x = x + block.attn.out_proj(context.transpose(1, 2).flatten(2)[0])
        if number < len(blocks) - 1:
            merged_x, sizes = by_hand(x, sizes, keys, heads, merge_tokens)
            x = merged_x.float()
        x = x + block.mlp(block.ln_2(x))
    embedding: Tensor = visual.ln_post(x[0]) @ visual.proj
    return embedding


def test_tower_computes_what_the_paper_says() -> None:
    model = deep()
    assert isinstance(model.visual, VisualTransformer)
    backend = TorchBackend(model, merge_tokens=9)
    rows = backend.encode_pixels(pixels())
    with torch.inference_mode():
        for row, picture in zip(rows, torch.from_numpy(pixels()), strict=True):
            expected = tower_by_hand(model.visual, picture, 9)
            # Four layers in float32.
            torch.testing.assert_close(torch.from_numpy(row), expected / expected.norm(), atol=1e-5, rtol=1e-4)


def test_no_merging_is_bit_for_bit_as_without_the_option() -> None:
    model = deep()
    with torch.inference_mode():
        features = model.encode_image(torch.from_numpy(pixels()))
        plain = (features / features.norm(dim=-1, keepdim=True)).numpy()
    for encoder in (Encoder(model), Encoder(model, merge_tokens=0)):
        np.testing.assert_array_equal(encoder.encode_pixels(pixels()), plain)
    # Nor does an encoder that merges change the model it was made of.
    merging = Encoder(model, merge_tokens=9)
    assert merging.facts.merge_tokens == 9
    assert np.abs(merging.encode_pixels(pixels()) - plain).max() > 1e-4
    np.testing.assert_array_equal(Encoder(model).encode_pixels(pixels()), plain)
    ids = np.array([[1, 5, 7, 2]])
    np.testing.assert_array_equal(merging.encode_tokens(ids), Encoder(model).encode_tokens(ids))


def test_rows_do_not_depend_on_the_batch() -> None:
    encoder = Encoder(deep(), merge_tokens=9)
    together = encoder.encode_pixels(pixels())
    apart = np.concatenate([encoder.encode_pixels(one[None]) for one in pixels()])
    np.testing.assert_allclose(together, apart, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_merges_almost_the_same(precision: str) -> None:
    full = Encoder(deep(), merge_tokens=9).encode_pixels(pixels())
    half = Encoder(deep(), merge_tokens=9, precision=precision).encode_pixels(pixels())
    assert (full * half).sum(axis=1).min() > 0.98


def test_gradients_reach_every_weight_through_merged_tokens() -> None:
    model = deep()
    assert isinstance(model.visual, VisualTransformer)
    model.visual.set_merging(9)
    model.encode_image(torch.from_numpy(pixels())).sum().backward()
    assert all(one.grad is not None and bool(one.grad.isfinite().all()) for one in model.visual.parameters())


# --- what is refused


def test_refuses_what_cannot_be_merged() -> None:
    with pytest.raises(ConfigError, match=r"merge_tokens: expected a whole number of at least 0, got -1"):
        Encoder(deep(), merge_tokens=-1)
    with pytest.raises(ConfigError, match=r"merge_tokens: expected a whole number of at least 0, got True"):
        Encoder(deep(), merge_tokens=True)
    with pytest.raises(ConfigError, match=r"the picture tower of this model is a ResNet; leave it out"):
        Encoder(tiny_model("resnet"), merge_tokens=2)


def test_refuses_a_number_that_leaves_too_few() -> None:
    Encoder(deep(6), merge_tokens=12)
    with pytest.raises(ConfigError) as refused:
        Encoder(deep(6), merge_tokens=13)
    assert str(refused.value) == (
        "merge_tokens: 13 in each of 5 layers would leave 7 of the 64 patches of this model, and at least 8 must be "
        "left; expected at most 12"
    )
    for name, most in {"ViT-B-16": 15, "ViT-B-32": 3, "ViT-L-14": 9, "ViT-L-14-336": 21, "ViT-H-14": 7}.items():
        merge_rules.check(most, vision_config(name))
        with pytest.raises(ConfigError, match=f"expected at most {most}"):
            merge_rules.check(most + 1, vision_config(name))


@pytest.mark.parametrize(
    ("model", "reason"), [("RN50", "the picture tower of RN50 is a ResNet"), ("ViT-B-16", "at most 15")]
)
def test_refuses_published_models_before_any_download(model: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=reason):
        Encoder(model, merge_tokens=16, download_root=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", ["hf:folder", "open_clip:ViT-B-32@file.pt"])
def test_refuses_other_families(model: str) -> None:
    with pytest.raises(ConfigError, match=r"merge_tokens: is for Chinese-CLIP; leave it out"):
        Encoder(model, merge_tokens=4)


def test_refuses_a_backend_that_is_open_already() -> None:
    with pytest.raises(ConfigError, match="merge_tokens: the model is a backend"):
        Encoder(TorchBackend(deep()), merge_tokens=4)


def test_refuses_layers_of_a_program() -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    model = deep()
    assert isinstance(model.visual, VisualTransformer)
    model.visual.transformer.resblocks[1] = Own()
    with pytest.raises(ConfigError, match="a layer of this picture tower is a program's own"):
        TorchBackend(model, merge_tokens=4)


# --- exported towers


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "deep.pt"
    torch.save(deep().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("root")


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_export_computes_what_torch_does(backend: BackendName, weights: Path, root: Path) -> None:
    expected = Encoder(weights, merge_tokens=9).encode_pixels(pixels())
    exported = Encoder(weights, backend=backend, merge_tokens=9, download_root=root)
    assert exported.facts.merge_tokens == 9
    # float32 of other libraries; a batch of another size too.
    np.testing.assert_allclose(exported.encode_pixels(pixels()), expected, atol=1e-4)
    np.testing.assert_allclose(exported.encode_pixels(pixels(1)), expected[:1], atol=1e-4)


def test_cache_keeps_merged_towers_apart_and_text_towers_once(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = open_backend(weights, backend="onnx", download_root=tmp_path)
    merging = open_backend(weights, backend="onnx", download_root=tmp_path, merge_tokens=9)
    made = sorted((path.parent.name, path.name) for path in tmp_path.rglob("*.onnx"))
    assert sorted(name for _, name in made) == ["model.img.fp32.onnx", "model.img.fp32.onnx", "model.txt.fp32.onnx"]
    assert len({folder for folder, _ in made}) == 2
    assert plain.encode_pixels(pixels()).tolist() != merging.encode_pixels(pixels()).tolist()
    # The key of a model that merges nothing is that of versions without merging.
    assert Source(weights, download_root=tmp_path).folder() == Source(weights, None, None, tmp_path, 0).folder()
    told = [line for line in capsys.readouterr().err.splitlines() if "merging 9 tokens a layer" in line]
    assert len(told) == 1
    assert re.search(
        r"; merging 9 tokens a layer: cosine to not merging: min 0\.\d+, mean 0\.\d+, same top-1 \d", told[0]
    )


def test_files_of_a_prefix_say_what_they_merge(weights: Path, tmp_path: Path) -> None:
    made = tower_files(Source(weights, download_root=tmp_path, merge_tokens=9), ["image"], "fp32", say=lambda _: None)
    prefix = str(made["image"]).removesuffix(".img.fp32.onnx")
    encoder = Encoder(prefix, backend="onnx")
    assert encoder.facts.merge_tokens == 9
    Encoder(prefix, backend="onnx", merge_tokens=9)
    with pytest.raises(ConfigError, match="was exported with merge_tokens 9, and 4 was asked for"):
        Encoder(prefix, backend="onnx", merge_tokens=4)


def test_pickled_encoder_merges_again(weights: Path) -> None:
    encoder = Encoder(weights, merge_tokens=9)
    again = pickle.loads(pickle.dumps(encoder))
    assert again.facts.merge_tokens == 9
    np.testing.assert_array_equal(again.encode_pixels(pixels()), encoder.encode_pixels(pixels()))


# --- commands, and vectors that never mix


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Emoji pictures, named by what they show."""
    folder = tmp_path_factory.mktemp("photos")
    for one in emoji_pack.load("noto")[:12]:
        (folder / f"{one.number}.webp").write_bytes(one.picture)
    return folder


@pytest.fixture(scope="module")
def index(photos: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("index") / "photos.index"
    cli.main(["index", "build", str(photos), "--output", str(output), "--model", str(weights), "--merge-tokens", "8"])
    return output


def test_index_holds_merged_vectors_and_says_so(
    index: Path, photos: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = open_index(index)
    assert opened.model.fingerprint == f"{deep().fingerprint()}+merge8"
    merging = Encoder(weights, merge_tokens=8, decode="auto", upright=True)
    paths = sorted(photos.iterdir())
    for path, row_D in zip(paths, merging.encode_images(paths), strict=True):
        np.testing.assert_allclose(opened.vector(path.name), row_D, atol=1e-5)
    # A search opens the model as the index has it: a picture finds itself with a cosine of 1.
    cli.main(["search", str(index), "--image", str(paths[3]), "--k", "1", "--json"])
    hit = json.loads(capsys.readouterr().out)["hits"][0]
    assert hit["id"] == paths[3].name
    assert hit["score"] == pytest.approx(1, abs=1e-5)
    for backend in ("torch", "onnx"):  # onnx opens the text tower alone, which merges nothing itself
        cli.main(["search", str(index), "笑脸", "--k", "2", "--backend", backend, "--json"])
        assert len(json.loads(capsys.readouterr().out)["hits"]) == 2


def test_index_takes_more_pictures_as_it_has_them(index: Path, photos: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copy.index"
    shutil.copytree(index, copied)
    one = emoji_pack.load("noto")[20]
    (tmp_path / "more.webp").write_bytes(one.picture)
    cli.main(["index", "add", str(copied), str(tmp_path / "more.webp")])
    assert open_index(copied).manifest.num_items == 13


@pytest.mark.parametrize("command", ["build", "search"])
def test_another_number_for_an_index_is_refused(
    command: str, index: Path, photos: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {
        "build": ["index", "build", str(photos), "--output", str(index)],
        "search": ["search", str(index), "笑脸"],
    }[command]
    with pytest.raises(SystemExit):
        cli.main([*given, "--merge-tokens", "4"])
    assert "the vectors were computed with --merge-tokens 8" in capsys.readouterr().err


def test_identity_of_unfinished_jobs_and_fingerprint_differ(weights: Path) -> None:
    say = Speaker(quiet=True)
    found = {}
    for count in (None, 0, 8, 9):
        chosen = Choice(str(weights), merge_tokens=count)
        encoder = open_quietly(chosen, say, with_fingerprint=True)
        found[count] = dict(identity(chosen, encoder)("image")), fingerprint(chosen, encoder)
    assert found[None] == found[0]
    assert "merge_tokens" not in found[0][0]
    assert found[8][0] == {**found[0][0], "merge_tokens": 8}
    assert len({of_weights for _, of_weights in found.values()}) == 3
    assert found[8][1] == f"{found[0][1]}+merge8"
    assert marks.merged_in(found[8][1]) == 8
    assert marks.merged_in(found[0][1]) == 0


@pytest.mark.usefixtures("full_towers")
def test_export_command_writes_a_merging_tower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model-arch", "ViT-Tiny-64", "--pytorch-ckpt-path", str(tiny_weights(tmp_path)), "--convert-vision"]
    prefix = tmp_path / "out" / "tiny"
    cli.main(["export", "onnx", *given, "--save-onnx-path", str(prefix), "--precisions", "fp32", "--merge-tokens", "6"])
    assert "merging 6 tokens a layer: cosine to not merging" in capsys.readouterr().out
    assert Encoder(prefix, backend="onnx").facts.merge_tokens == 6


def tiny_weights(folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = CLIP.from_config(zoo.model_config("ViT-Tiny-64", "BERT-Tiny-chinese"))
    path = folder / "tiny.pt"
    torch.save(model.state_dict(), path)
    return path


def test_option_names_itself_in_refusals(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for model, told in {
        "RN50": "--merge-tokens: merges the tokens of a Vision Transformer, and the picture tower of RN50 is a ResNet",
        "hf:folder": "--merge-tokens: is for Chinese-CLIP, and hf:folder is of another family",
    }.items():
        with pytest.raises(SystemExit):
            cli.main(["index", "build", str(tmp_path), "--output", "x", "--model", model, "--merge-tokens", "4"])
        assert told in capsys.readouterr().err
