"""What a run trains: frozen parts stay bit for bit, adapters start as nothing, train, and merge into the weights."""

import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import TOKENS, tiny_model, tiny_pixels
from torch import Tensor

from cn_clip.clip.loading import load_from_name, open_model
from cn_clip.clip.model import CLIP
from cn_clip.clip.weights.low_rank import LowRank, is_adapter
from cn_clip.errors import CheckpointError, ConfigError, MissingExtraError
from cn_clip.training import adapt

LAYER = "bert.encoder.layer"
BLOCK = "visual.transformer.resblocks.0"


def plain_state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return adapt.file_names(model.state_dict())


def trained_names(model: CLIP) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def with_lora(kind: str = "vit", *, rank: int = 4, alpha: float = 8.0, seed: int = 1) -> CLIP:
    model = tiny_model(kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapt.add_lora(model, rank, alpha)
    return model


def features(model: CLIP) -> tuple[Tensor, Tensor]:
    model.eval()
    with torch.no_grad():
        return model.encode_image(tiny_pixels(model)), model.encode_text(TOKENS)


def train(model: CLIP, steps: int = 3) -> None:
    """A few steps that bring pairs together, as a trainer would take them."""
    adapt.set_training_mode(
        model, SimpleNamespace(freeze_vision=False, freeze_text=False, freeze_text_layers=0, freeze_bn=False)
    )
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        image_BD, text_BD, scale = model(tiny_pixels(model), TOKENS)
        loss = torch.nn.functional.cross_entropy(scale * image_BD @ text_BD.T, torch.arange(3))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()


def save(model: CLIP, path: Path, **changes: Any) -> Path:
    settings = adapt.lora_settings(model)
    state = {f"module.{name}": value for name, value in plain_state_dict(model).items()}
    content: dict[str, Any] = {"epoch": 1, "step": 3, "name": "run", "state_dict": state, "optimizer": {"state": {}}}
    if settings:
        content["lora"] = settings.entry()
    torch.save(content | changes, path)
    return path


# --- freezing


@pytest.mark.parametrize(
    ("vision", "text", "layers", "frozen"),
    [
        (False, False, 0, ()),
        (True, False, 0, ("visual.",)),
        (False, True, 0, ("bert.",)),
        (False, False, 1, ("bert.embeddings.", f"{LAYER}.0.")),
        (False, False, 2, ("bert.",)),
        (True, False, 1, ("visual.", "bert.embeddings.", f"{LAYER}.0.")),
        (True, True, 1, ("visual.", "bert.")),
    ],
)
def test_freezing_takes_the_named_parts_and_nothing_else(
    vision: bool, text: bool, layers: int, frozen: tuple[str, ...]
) -> None:
    model = tiny_model()
    adapt.freeze(model, vision=vision, text=text, text_layers=layers)
    kept = {name for name, _ in model.named_parameters() if not name.startswith(frozen or ("nothing",))}
    assert trained_names(model) == kept
    assert {"text_projection", "logit_scale"} <= kept


def test_more_frozen_layers_than_the_text_tower_has_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--freeze-text-layers 3: the text tower has 2 layers"):
        adapt.freeze(tiny_model(), vision=False, text=False, text_layers=3)


def test_freezing_is_logged_in_the_words_users_look_for(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=adapt.logger.name):
        adapt.freeze(tiny_model(), vision=True, text=True, text_layers=0)
    assert [record.getMessage() for record in caplog.records] == [
        "The visual encoder is freezed during training.",
        "The text encoder is freezed during training.",
        "Both encoders are freezed: only text_projection and logit_scale are trained.",
    ]


def test_frozen_parts_compute_as_in_evaluation_and_the_others_train() -> None:
    model = tiny_model("resnet")
    options = SimpleNamespace(freeze_vision=True, freeze_text=False, freeze_text_layers=1, freeze_bn=False)
    adapt.set_training_mode(model, options)
    evaluating = {name for name, module in model.named_modules() if not module.training}
    expected = ("visual", "bert.embeddings", f"{LAYER}.0")
    assert evaluating == {
        name for name, _ in model.named_modules() if any(f"{name}.".startswith(f"{part}.") for part in expected)
    }
    statistics = model.visual.bn1.running_mean.clone()
    model.encode_image(tiny_pixels(model))
    assert torch.equal(model.visual.bn1.running_mean, statistics)


# --- adapters


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_model_with_new_adapters_computes_what_it_did_before(kind: str) -> None:
    model = with_lora(kind)
    assert all(not value.any() for name, value in plain_state_dict(model).items() if name.endswith("lora_B.weight"))
    for before, after in zip(features(tiny_model(kind)), features(model), strict=True):
        torch.testing.assert_close(after, before, atol=1e-6, rtol=1e-6)  # kernels round by where memory begins


def test_adapters_stand_on_attention_and_perceptron_of_both_towers() -> None:
    names = plain_state_dict(with_lora())
    stems = {name.removesuffix(".lora_A.weight") for name in names if name.endswith(".lora_A.weight")}
    block, layer = (f"{stem}." for stem in (BLOCK, f"{LAYER}.0"))
    assert {stem for stem in stems if stem.startswith((block, layer))} == {
        *(block + name for name in ("attn.in_proj", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")),
        *(f"{layer}attention.self.{name}" for name in ("query", "key", "value")),
        *(layer + name for name in ("attention.output.dense", "intermediate.dense", "output.dense")),
    }
    assert len(stems) == 2 * 4 + 2 * 6
    assert names[f"{BLOCK}.attn.in_proj.lora_A.weight"].shape == (4, 64)
    assert names[f"{BLOCK}.attn.in_proj.lora_B.weight"].shape == (192, 4)


def test_a_resnet_has_adapters_on_convolutions_and_attention_pool() -> None:
    names = plain_state_dict(with_lora("resnet"))
    assert names["visual.layer1.0.conv2.lora_A.weight"].shape == (4, 8, 3, 3)
    assert names["visual.layer1.0.conv2.lora_B.weight"].shape == (8, 4, 1, 1)
    assert {f"visual.attnpool.{letter}_proj.lora_A.weight" for letter in "qkvc"} < names.keys()
    assert not any(is_adapter(name) and ".bn" in name for name in names)


def test_only_adapters_and_the_scale_are_trained() -> None:
    assert {adapt.file_name(name) for name in trained_names(with_lora())} == {
        "logit_scale",
        *(name for name in plain_state_dict(with_lora()) if is_adapter(name)),
    }


def test_frozen_parts_get_no_adapters() -> None:
    model = tiny_model()
    adapt.freeze(model, vision=True, text=False, text_layers=1)
    adapt.add_lora(model, 2)
    adapted = {name for name in trained_names(model) if name != "logit_scale"}
    assert adapted
    assert all(name.startswith(f"{LAYER}.1.") for name in adapted)
    assert adapt.lora_settings(model) == LowRank(2, 4.0)  # alpha: twice the rank


def test_adapters_on_nothing_are_refused() -> None:
    model = tiny_model()
    adapt.freeze(model, vision=True, text=True, text_layers=0)
    with pytest.raises(ConfigError, match=r"--lora-rank: both towers are frozen"):
        adapt.add_lora(model, 2)


def test_without_peft_the_command_that_installs_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"--lora-rank needs the package `peft`.*'cn-clip-next\[lora\]'"):
        adapt.add_lora(tiny_model(), 2)


def test_adapters_are_drawn_from_torchs_seed() -> None:
    first, again, other = (plain_state_dict(with_lora(seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = f"{BLOCK}.attn.in_proj.lora_A.weight"
    assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_every_adapter_trains_and_no_weight_under_it_changes(kind: str) -> None:
    model = with_lora(kind)
    before = {name: value.clone() for name, value in plain_state_dict(model).items()}
    train(model)
    after = plain_state_dict(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"logit_scale", *filter(is_adapter, before)}


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_merged_file_has_the_features_of_the_model_with_adapters(kind: str, tmp_path: Path) -> None:
    model = with_lora(kind)
    train(model)
    wanted = features(model)
    base = features(tiny_model(kind))
    merged, checkpoint = open_model(save(model, tmp_path / "run.pt"))
    for got, expected, before in zip(features(merged), wanted, base, strict=True):
        # float32 sums in another order
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        assert (expected - before).abs().max() > 1e-3
    assert checkpoint.lora == LowRank(4, 8.0)
    loaded, _ = load_from_name(str(tmp_path / "run.pt"), device="cpu")
    assert loaded.state_dict().keys() == tiny_model(kind).state_dict().keys()


def test_recomputed_activations_give_the_same_gradients() -> None:
    gradients = []
    for recompute in (False, True):
        model = with_lora()
        model.set_grad_checkpointing(recompute)
        adapt.set_training_mode(
            model, SimpleNamespace(freeze_vision=False, freeze_text=False, freeze_text_layers=0, freeze_bn=False)
        )
        torch.manual_seed(5)
        image_BD, text_BD, scale = model(tiny_pixels(model), TOKENS)
        torch.autograd.backward((scale * image_BD * text_BD).sum())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys() == trained_names(with_lora())
    for name, gradient in plain.items():
        assert torch.equal(gradient, recomputed[name]), name


def test_adapters_train_in_mixed_precision() -> None:
    model = with_lora()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features_BD = model.encode_image(tiny_pixels(model))
    torch.autograd.backward(features_BD.float().square().sum())
    gradient = model.get_parameter(f"{BLOCK}.attn.lora_B.default.weight").grad
    assert gradient is not None
    assert gradient.dtype is torch.float32
    assert gradient.abs().sum() > 0


# --- files


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_model_with_adapters_goes_through_a_file_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model = with_lora(kind)
    train(model)
    checkpoint = adapt.read_for_training(with_lora(kind, seed=9), save(model, tmp_path / "run.pt"))
    resumed = with_lora(kind, seed=9)
    adapt.load_plain_state_dict(resumed, checkpoint.state_dict, checkpoint.path)
    saved, restored = model.state_dict(), resumed.state_dict()
    assert saved.keys() == restored.keys()
    assert all(torch.equal(value, restored[name]) for name, value in saved.items())


def test_a_model_without_adapters_keeps_its_names() -> None:
    model = tiny_model()
    plain = plain_state_dict(model)
    assert list(plain) == list(model.state_dict())
    other = tiny_model(seed=3)
    adapt.load_plain_state_dict(other, plain, Path("run.pt"))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in plain.items())


def test_base_weights_keep_their_names_beside_the_adapters() -> None:
    plain = plain_state_dict(with_lora())
    base = tiny_model().state_dict()
    assert {name for name in plain if not is_adapter(name)} == base.keys()
    assert all(torch.equal(plain[name], value) for name, value in base.items())


def test_a_run_with_adapters_starts_from_weights_without() -> None:
    model = with_lora()
    drawn = {name: value.clone() for name, value in plain_state_dict(model).items() if is_adapter(name)}
    adapt.load_plain_state_dict(model, tiny_model(seed=4).state_dict(), Path("base.pt"))
    plain = plain_state_dict(model)
    assert torch.equal(plain["visual.conv1.weight"], tiny_model(seed=4).visual.conv1.weight)
    assert all(torch.equal(plain[name], value) for name, value in drawn.items())


def test_a_run_without_adapters_starts_from_merged_ones(tmp_path: Path) -> None:
    model = with_lora()
    train(model)
    checkpoint = adapt.read_for_training(tiny_model(), save(model, tmp_path / "run.pt"))
    assert not any(map(is_adapter, checkpoint.state_dict))


@pytest.mark.parametrize(("rank", "alpha"), [(2, 8.0), (4, 4.0)])
def test_adapters_of_another_size_or_strength_are_refused(rank: int, alpha: float, tmp_path: Path) -> None:
    path = save(with_lora(rank=rank, alpha=alpha), tmp_path / "run.pt")
    expected = rf"trained with --lora-rank {rank} --lora-alpha {alpha:g}, this run has --lora-rank 4 --lora-alpha 8"
    with pytest.raises(CheckpointError, match=expected):
        adapt.read_for_training(with_lora(), path)


def test_a_missing_adapter_is_named() -> None:
    model = with_lora()
    tensors = plain_state_dict(model)
    del tensors[f"{BLOCK}.attn.in_proj.lora_B.weight"]
    with pytest.raises(
        CheckpointError, match=rf"run\.pt: the tensor {BLOCK}\.attn\.in_proj\.lora_B\.weight is missing"
    ):
        adapt.load_plain_state_dict(model, tensors, Path("run.pt"))


def test_the_bias_of_the_sigmoid_loss_starts_where_the_run_has_it() -> None:
    model = tiny_model()
    model.register_parameter("logit_bias", torch.nn.Parameter(torch.tensor(-7.0)))
    adapt.load_plain_state_dict(model, tiny_model(seed=4).state_dict(), Path("base.pt"))
    assert model.get_parameter("logit_bias").item() == -7
    assert torch.equal(model.visual.conv1.weight, tiny_model(seed=4).visual.conv1.weight)
