"""The same values on a GPU as on the CPU; each test runs on the CPU too, where it is compared with float64.

What else runs on both: the tests that take `device` in the files of the step, of the model, of exact search, of the
golden values and of many processes.
"""

import contextlib
import copy
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_process_runs import build, emoji_split, options, run
from test_step import TEACHER, batches, gradients, learner, model_with
from tiny_models import CONFIGS, TOKENS, tiny_model, tiny_pixels
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import losses

from cn_clip import ranks
from cn_clip.clip import Encoder, load_from_name
from cn_clip.clip.model import CLIP
from cn_clip.data.lmdb_store import IMAGES, ImageStore
from cn_clip.data.pictures import load_picture
from cn_clip.errors import ConfigError
from cn_clip.eval import extract_features
from cn_clip.training import adapt, building, trainer

TEXTS = ["猫", "一只黑白相间的狗在雪地里奔跑，嘴里叼着一个红色的飞盘。", "生日蛋糕", ""]


def exact(model: CLIP) -> CLIP:
    """The same weights in float64, on the CPU."""
    return copy.deepcopy(model).cpu().double()


def distance(ours: Any, theirs: Tensor) -> float:
    """Of the row that is farthest off, as a share of its length."""
    ours = torch.as_tensor(ours).detach().cpu().double()
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max())


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True)


# --- features ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_both_towers_give_the_features_of_float64(kind: str, device: torch.device) -> None:
    model = tiny_model(kind)
    pixels, padded = tiny_pixels(model, 5), torch.cat([TOKENS, torch.zeros(3, 30, dtype=torch.long)], dim=1)
    with torch.inference_mode():
        expected = exact(model)(pixels.double(), TOKENS)
        model.to(device)
        for tokens in (TOKENS, padded):
            image, text, scale = model(pixels.to(device), tokens.to(device))
            assert distance(image, expected[0]) < 1e-5
            assert distance(text, expected[1]) < 1e-5
            assert float(scale) == pytest.approx(float(expected[2]), rel=1e-6)


# The smallest cosine to float64 that each arithmetic keeps.
COSINES = {"fp32": 1 - 1e-6, "tf32": 0.99999, "fp16": 0.9999, "bf16": 0.999}


@pytest.mark.parametrize("precision", COSINES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_each_arithmetic_stays_as_close_as_documented(kind: str, precision: str, device: torch.device) -> None:
    model = tiny_model(kind)
    pixels = tiny_pixels(model, 5)
    with torch.inference_mode():
        images, texts = (unit(rows) for rows in (exact(model).encode_image(pixels), exact(model).encode_text(TOKENS)))
    with tf32() if precision == "tf32" else contextlib.nullcontext():
        encoder = Encoder(model, device=device, precision="fp32" if precision == "tf32" else precision)
        rows = encoder.encode_pixels(pixels.numpy()), encoder.encode_tokens(TOKENS.numpy())
    for found, expected in zip(rows, (images, texts), strict=True):
        assert float((torch.from_numpy(found).double() * expected).sum(dim=1).min()) >= COSINES[precision]


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    """As commands set it; it means nothing on the CPU."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    ranks.set_float32_products(torch.device("cuda", 0), is_strict=False)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_extracted_features_are_those_of_float64(device: torch.device, tmp_path: Path) -> None:
    emoji_split(tmp_path / "split")
    with (tmp_path / "texts.jsonl").open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"text_id": number, "text": text}) + "\n" for number, text in enumerate(TEXTS))
    inputs = [f"--image-data={tmp_path / 'split' / IMAGES}", f"--text-data={tmp_path / 'texts.jsonl'}"]
    outputs = [f"--image-feat-output-path={tmp_path / 'i.npz'}", f"--text-feat-output-path={tmp_path / 't.npz'}"]
    which = ["--extract-image-feats", "--extract-text-feats", "--img-batch-size=5", "--text-batch-size=3"]
    strict = ["--strict-fp32"] if device.type == "cuda" else []
    extract_features.main([*which, *inputs, *outputs, *strict, "--resume=Emoji-Tiny", f"--device={device.type}"])
    model, transform = load_from_name("Emoji-Tiny", device="cpu")
    store = ImageStore(tmp_path / "split" / IMAGES)
    images, texts = (np.load(tmp_path / name) for name in ("i.npz", "t.npz"))
    loaded = [load_picture(store.picture(one), store.where(one), transform) for one in images["ids"].tolist()]
    with torch.inference_mode():
        expected = unit(exact(model).encode_image(torch.stack(loaded)))
    assert distance(images["features"], expected) < 1e-5
    double = Encoder(exact(model), device="cpu").texts
    tokens = torch.from_numpy(double.pad(double.rows([TEXTS[number] for number in texts["ids"].tolist()])))
    with torch.inference_mode():
        assert distance(texts["features"], unit(exact(model).encode_text(tokens))) < 1e-5


# --- a step of training -----------------------------------------------------------------------------------------------

STEPS: dict[str, dict[str, Any]] = {
    "clip": {},
    "siglip": {"kind": "siglip"},
    "multi-positive": {"multi_positive": True},
    "distillation": {"teacher": TEACHER},
    "checkpointing": {"checkpointing": True},
    "lora": {"lora": True},
    "resnet": {"changes": {"vision_layers": (1, 1, 1, 1), "vision_width": 8, "vision_patch_size": None}},
}


def prepared(settings: dict[str, Any]) -> tuple[CLIP, dict[str, Any]]:
    """A model as the settings want it, and what is left of them for the learner."""
    rest = dict(settings)
    model = model_with(**rest.pop("changes", {}))
    if rest.get("kind") == "siglip":
        model.add_logit_bias()
    model.set_grad_checkpointing(rest.pop("checkpointing", False))
    if rest.pop("lora", False):
        adapt.add_lora(model, 2, 4.0)
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # which begins as nothing, and its partner would get no gradient
                parameter.data = 0.1 * torch.randn_like(parameter)
    return model, rest


@pytest.mark.parametrize("name", STEPS)
def test_loss_and_gradients_of_a_step_are_those_of_float64(name: str, device: torch.device) -> None:
    model, settings = prepared(STEPS[name])
    double = exact(model)
    model.to(device)
    scores = learner(model, **settings).backward(batches(1, device))
    expected = learner(double, **settings).backward(batches(1, torch.device("cpu")))
    assert float(scores.loss) == pytest.approx(float(expected.loss), rel=1e-5)
    assert (float(scores.images_right), float(scores.texts_right)) == tuple(map(float, expected[1:]))
    ours, theirs = gradients(model), gradients(double)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if float(value.norm()) > 1e-7:  # a bias before a normalisation has no gradient but rounding errors
            off = float((ours[key].cpu().double() - value).norm() / value.norm())
            assert off < 1e-3, f"{key}: {off:.1e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_mixed_precision_point_where_those_of_float64_do(dtype: torch.dtype, device: torch.device) -> None:
    model = model_with(device)
    learner(model, autocast=lambda: torch.autocast(device.type, dtype)).backward(batches(1, device))
    double = exact(model_with())
    learner(double).backward(batches(1, torch.device("cpu")))
    ours, theirs = (
        torch.cat([value.cpu().double().flatten() for value in gradients(one).values()]) for one in (model, double)
    )
    cosine = torch.nn.functional.cosine_similarity(ours, theirs, dim=0)
    assert cosine > {torch.bfloat16: 0.995, torch.float16: 0.9999}[dtype]


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emoji_split(tmp_path_factory.mktemp("split"))


def test_a_run_goes_on_from_one_device_to_the_other(split: Path, device: torch.device, tmp_path: Path) -> None:
    # No dropout where the text tower is frozen: devices draw different random numbers.
    settings: dict[str, Any] = {"freeze_text": True, "skip_scheduler": True, "val_data": None}
    settings["strict_fp32"] = device.type == "cuda"
    whole = run(split, tmp_path, name="whole", max_steps=4, **settings)
    expected = [float(loss) for loss in losses(whole)]
    assert len(expected) == 4
    for name, first, then in (("there", "cpu", device.type), ("back", device.type, "cpu")):
        begun = run(split, tmp_path, name=name, max_steps=2, **{**settings, "device": first})
        gone_on = run(split, tmp_path, name=name, max_steps=4, **{**settings, "device": then})
        assert "2 steps)" in gone_on
        assert [float(loss) for loss in losses(begun) + losses(gone_on)] == pytest.approx(expected, rel=2e-3)
        saved = torch.load(tmp_path / name / "checkpoints" / "epoch_latest.pt", weights_only=True)
        assert {value.device.type for value in saved["state_dict"].values()} == {"cpu"}


class Reads(TorchDispatchMode):
    """Which operations hand a value to Python, or need one to know the size of their result: they wait for a GPU."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        is_masked = name.startswith("index") and any(
            isinstance(one, Tensor) and one.dtype == torch.bool
            for one in (args[1] if isinstance(args[1], list) else ())
        )
        if name.startswith(self.WAITING) or is_masked:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_waits(device: torch.device) -> Iterator[None]:
    """Fails when Python waits for the device inside; on the CPU, when it reads a value that a GPU would have."""
    if device.type == "cuda":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it calls itself a prototype
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    with Reads() as reads:
        yield
    assert reads.found == []


FLAGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"precision": "bf16"},
    "accumulated": {"accum_freq": 3, "precision": "bf16"},
    "multi-positive": {"multi_positive": True},
    "siglip": {"loss": "siglip"},
    "distillation": {"distillation": True, "teacher_model_name": "Emoji-Tiny"},
    "checkpointing": {"grad_checkpointing": True},
    "lora": {"lora_rank": 2},
    "masked": {"mask_ratio": 0.5},
    "frozen": {"freeze_vision": True},
    "resnet": {"vision_model": "RN-Tiny-64"},
}


@pytest.mark.parametrize("name", FLAGS)
def test_a_step_waits_for_nothing_of_the_device(
    name: str, split: Path, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = build(split, tmp_path, device=device, num_threads=1, **FLAGS[name])
    monkeypatch.setattr(trainer.Later, "item", lambda self: 1.0)  # waits for the step before, as it should
    if device.type == "cpu":  # AdamW counts its steps in tensors of the CPU, on every device
        monkeypatch.setattr(one.optimizer, "step", lambda: None)
    one._set_training_mode()
    losses_of_steps = []
    for step, update in enumerate(one._updates(0)):
        with contextlib.nullcontext() if step == 0 else no_waits(device):  # the first one makes the optimizer's state
            losses_of_steps.append(one._step(step, update).loss)
    assert len(losses_of_steps) == one.steps_per_epoch
    assert all(math.isfinite(loss) for loss in losses_of_steps)


def test_what_waits_is_noticed(device: torch.device) -> None:
    value = torch.ones(2, device=device)
    with pytest.raises((AssertionError, RuntimeError)), no_waits(device):
        float(value.sum())
    with pytest.raises((AssertionError, RuntimeError)), no_waits(device):
        value[value > 0]


@contextlib.contextmanager
def little_memory(device: torch.device) -> Iterator[None]:
    """On a GPU the allocator gives next to nothing; on the CPU the picture tower asks for more than any machine has."""
    with pytest.MonkeyPatch.context() as patch:
        if device.type == "cpu":
            patch.setattr(CLIP, "encode_image", lambda *_: torch.empty(2**50))
            yield
            return
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1e-6)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)


def test_out_of_memory_is_one_sentence(
    split: Path, device: torch.device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with little_memory(device), pytest.raises(ConfigError, match=r"^out of memory \([^\n]*--grad-checkpointing"):
        building.run(options(split, tmp_path, device=device.type, val_data=None, max_steps=1))
    command = ["--extract-image-feats", f"--image-data={split / IMAGES}", "--resume=Emoji-Tiny"]
    command += [f"--image-feat-output-path={tmp_path / 'i.jsonl'}", f"--device={device.type}"]
    with little_memory(device), pytest.raises(SystemExit) as left:
        extract_features.main(command)
    assert left.value.code == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(said) == 1
    assert "out of memory" in said[0]
