"""The pieces of training against values worked by hand and recorded from the reference."""

import contextlib
import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_files import tsv_line
from deterministic import SMALL_MODEL, state_dict, training_batches
from in_process_runs import emoji_split, options
from PIL import Image
from torch.utils.data import DistributedSampler

from cn_clip.clip import tokenizer
from cn_clip.clip.model import CLIP
from cn_clip.clip.transforms import MEAN, STD, normalised
from cn_clip.data.lmdb_store import Pair, Split, SplitWriter
from cn_clip.errors import ConfigError
from cn_clip.stopping import StopWaiting
from cn_clip.training import inputs
from cn_clip.training import main as training
from cn_clip.training.building import explained_memory
from cn_clip.training.distributed import Parallel
from cn_clip.training.inputs import EpochSampler, TrainingData
from cn_clip.training.log_lines import Clock
from cn_clip.training.loss import Objective, Pairs, contrastive_scores
from cn_clip.training.params import Options
from cn_clip.training.scheduler import build_optimizer, clamp_logit_scale, learning_rate
from cn_clip.training.step import Batch, Learner, cut_to_longest
from cn_clip.training.trainer import Trainer
from cn_clip.training.validation import validate

GOLDEN = Path(__file__).parent / "golden"


def small_model() -> CLIP:
    model = CLIP(**SMALL_MODEL)
    shapes = [(name, tuple(value.shape)) for name, value in model.state_dict().items()]
    model.load_state_dict({name: torch.from_numpy(value) for name, value in state_dict(shapes).items()})
    return model


@pytest.mark.parametrize(("step", "rate"), [(0, 0.25), (3, 1.0), (4, 1.0), (6, 0.75), (8, 0.5), (10, 0.25), (12, 0.0)])
def test_learning_rate_warms_up_linearly_and_falls_as_half_a_cosine(step: int, rate: float) -> None:
    # With 4 warm-up steps of 12: (1 + cos(pi * (step - 4) / 8)) / 2; at 6 and 10 that is not a round number.
    expected = {6: (1 + math.cos(math.pi / 4)) / 2, 10: (1 + math.cos(3 * math.pi / 4)) / 2}.get(step, rate)
    assert learning_rate(step, base_lr=1.0, warmup=4, total_steps=12) == pytest.approx(expected)


def test_norm_gains_of_the_picture_tower_do_not_decay_but_those_of_bert_do() -> None:
    model = small_model()
    optimizer = build_optimizer(model, lr=1.0, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
    free, decayed = ({id(parameter) for parameter in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.2]
    assert {id(model.logit_scale), id(model.visual.ln_pre.weight), id(model.bert.embeddings.LayerNorm.bias)} <= free
    assert id(model.bert.embeddings.LayerNorm.weight) in decayed
    assert len(free) + len(decayed) == len(list(model.parameters()))


def test_logit_scale_is_kept_between_0_and_ln_100() -> None:
    scale = torch.nn.Parameter(torch.tensor(7.0))
    clamp_logit_scale(scale)
    assert scale.item() == pytest.approx(4.6052)
    scale.data.fill_(-1)
    clamp_logit_scale(scale)
    assert scale.item() == 0


@pytest.mark.parametrize("use_augment", [False, True])
def test_grey_of_16_bits_is_scaled_unless_the_reference_is_asked_for(use_augment: bool, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((64, 64), 257 * 100, dtype=np.uint16)).save(buffer, "PNG")
    with SplitWriter(tmp_path / "train") as writer:
        for number in range(4):
            writer.put_image(number, tsv_line(number, buffer.getvalue()).split(b"\t")[1].strip())
            writer.put_pair(Pair(number, number, f"猫{number}"))
    white = (1 - np.array(MEAN)) / np.array(STD)
    grey = (100 / 255 - np.array(MEAN)) / np.array(STD)
    trained, validated = {}, {}
    for decode in ("exact", "reference"):
        chosen = options(tmp_path / "train", tmp_path, decode=decode, use_augment=use_augment)
        data = inputs.validation_data(chosen, 64, torch.device("cpu"))
        assert data is not None
        pixels = normalised(next(iter(data.pixels))[1])
        (validated[decode],) = {tuple(picture[:, 32, 32].tolist()) for picture in pixels}
        batch = next(iter(inputs.training_data(chosen, 64, torch.device("cpu")).loader))
        trained[decode] = normalised(batch.pixels)[:, :, 32, 32]
    assert validated["reference"] == pytest.approx(white, abs=1e-5)
    assert validated["exact"] == pytest.approx(grey, abs=1e-5)
    if use_augment:  # which changes the values
        assert not torch.allclose(trained["exact"], trained["reference"], atol=0.1)
    else:
        assert trained["reference"][0].tolist() == pytest.approx(white, abs=1e-5)
        assert trained["exact"][0].tolist() == pytest.approx(grey, abs=1e-5)


@pytest.mark.parametrize(("num_samples", "batch_size", "epoch"), [(10, 4, 0), (12, 4, 3), (7, 7, 1)])
def test_order_of_samples_is_that_of_torch_distributed_sampler(num_samples: int, batch_size: int, epoch: int) -> None:
    sampler = EpochSampler(num_samples, batch_size, seed=123)
    sampler.epoch = epoch
    padded = -(-num_samples // batch_size) * batch_size
    theirs = DistributedSampler(range(padded), num_replicas=1, rank=0, shuffle=True, seed=123)  # type: ignore[arg-type]
    theirs.set_epoch(epoch)
    assert list(sampler) == [index % num_samples for index in theirs]


def test_sampler_started_later_gives_the_rest_of_the_same_order() -> None:
    sampler = EpochSampler(10, 4, seed=1)
    whole = list(sampler)
    sampler.start = 1
    assert list(sampler) == whole[4:]
    assert len(sampler) == 8


def test_texts_are_cut_to_the_longest_row() -> None:
    tokens = torch.tensor([[101, 5, 102, 0, 0], [101, 102, 0, 0, 0]])
    assert cut_to_longest(tokens).tolist() == [[101, 5, 102], [101, 102, 0]]


class FixedBatches(list):  # type: ignore[type-arg]
    """Stands for a loader."""


def test_five_updates_give_the_losses_rates_and_weights_of_the_reference(tmp_path: Path, device: torch.device) -> None:
    golden = np.load(GOLDEN / "training.npz")
    model = small_model().to(device)
    options = Options(
        train_data="", max_steps=5, warmup=2, lr=1e-3, beta1=0.9, beta2=0.98, eps=1e-6, batch_size=8, precision="fp32"
    )
    optimizer = build_optimizer(model, lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    learner = Learner(Parallel(model, device), Objective(), scaler, contextlib.nullcontext)
    data = TrainingData(FixedBatches(), EpochSampler(40, 8, seed=1))  # type: ignore[arg-type]
    trainer = Trainer(options, learner, optimizer, data, None, checkpoint_dir=tmp_path)
    losses, rates = [], []
    for step, (pixels, tokens) in enumerate(training_batches()):
        tokens_BL = cut_to_longest(torch.from_numpy(tokens)).to(device)
        batch = Batch(torch.from_numpy(pixels).to(device), tokens_BL, [(0, 0)] * 8, None)
        result = trainer._step(step, [batch])
        losses.append(result.loss.item())
        rates.append(optimizer.param_groups[0]["lr"])
    np.testing.assert_allclose(losses, golden["losses"], rtol=2e-5)  # float32 sums in another order
    np.testing.assert_allclose(rates, golden["rates"], rtol=1e-12)
    for name in golden.files[2:]:
        # Adam divides by the root of tiny squares: a rounding difference of a gradient near 0 moves a weight visibly.
        weight = model.state_dict()[name].cpu().numpy()
        np.testing.assert_allclose(weight, golden[name], atol=2e-4 if device.type == "cpu" else 2.5e-3)
        assert np.median(np.abs(weight - golden[name])) < 1e-5


def test_validation_equals_the_plain_computation() -> None:
    model = small_model()
    torch.manual_seed(0)
    pixels = torch.randn(4, 3, 32, 32)
    texts = tokenizer.encode(["猫", "一只白色的狗", "红色的自行车", "海边的日落", "狗"], 52)
    pairs = [(0, 0), (1, 1), (2, 2), (3, 3), (1, 4), (0, 2)]
    split = Split([10, 11, 12, 13], ["猫", "一只白色的狗", "红色的自行车", "海边的日落", "狗"], pairs)
    sampler = EpochSampler(6, 3, seed=5)
    result = validate(model, split, texts, [pixels[:3], pixels[3:]], sampler, torch.no_grad)
    with torch.no_grad():
        images, rows, scale = model.eval()(
            pixels[[0, 1, 2, 3, 1, 0]], torch.from_numpy(tokenizer.pad([texts[t] for _, t in pairs], 10))
        )
    losses = [contrastive_scores(Pairs(images[batch], rows[batch], scale)).loss.item() for batch in sampler.batches()]
    assert result.loss == pytest.approx(sum(losses) / 2, rel=1e-5)
    similarity = model(pixels, torch.from_numpy(tokenizer.pad(texts, 10)))
    order = (similarity[1] @ similarity[0].T).argsort(dim=1, descending=True)
    relevant = {0: {0}, 1: {1}, 2: {2, 0}, 3: {3}, 4: {1}}
    first = [int(order[text][0]) in relevant[text] for text in range(5)]
    assert result.text_to_image.at[1] == pytest.approx(sum(first) / 5)
    assert result.text_to_image.at[5] == 1.0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"batch_size": 0}, "--batch-size: expected at least 1, got 0"),
        ({"mask_ratio": 1.0}, "--mask-ratio"),
        ({"context_length": 2}, "--context-length"),
        ({"max_steps": 0}, "--max-steps"),
        ({"accum_freq": 0}, "--accum-freq: expected at least 1"),
        ({"distillation": True}, "--distillation: needs --teacher-model-name"),
        ({"gather_with_grad": True, "skip_aggregate": True}, "contradict each other"),
        ({"keep_checkpoints": 0}, "--keep-checkpoints: expected at least 1, or -1 to keep all, got 0"),
        ({"keep_checkpoints": -2}, "--keep-checkpoints: expected at least -1"),
    ],
)
def test_settings_that_cannot_be_obeyed_are_refused(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Options(train_data="x", **setting)  # type: ignore[arg-type]


def test_out_of_memory_names_the_flags_that_help() -> None:
    expected = r"(?s)out of memory \(.*: --grad-checkpointing, --precision bf16"
    with pytest.raises(ConfigError, match=expected), explained_memory():
        torch.empty(2**50)  # more than any machine has
    with pytest.raises(ConfigError, match="CUDA out of memory"), explained_memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def test_a_model_too_large_for_the_device_is_told_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(torch.nn.Module, "to", too_large)
    with pytest.raises(ConfigError, match=r"out of memory \(CUDA .*--grad-checkpointing"):
        training.run(options(emoji_split(tmp_path / "data"), tmp_path))


def test_other_errors_pass_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="size of tensor"), explained_memory():
        torch.zeros(2) + torch.zeros(3)


def test_adam_settings_depend_on_the_picture_tower() -> None:
    large, resnet = Options(train_data="x", vision_model="ViT-L-14"), Options(train_data="x", vision_model="RN50")
    assert (large.optimizer_setting("lr"), large.optimizer_setting("beta2")) == (4e-4, 0.98)
    assert (resnet.optimizer_setting("lr"), resnet.optimizer_setting("beta2")) == (5e-4, 0.999)
    assert resnet.optimizer_setting("eps") == 1e-8
    assert Options(train_data="x", lr=1e-5).optimizer_setting("lr") == 1e-5


def test_the_wait_for_data_is_that_for_the_loader_alone() -> None:
    """Two steps: 3 + 4 s for two batches of a step, 5 s to copy each, 7 s to compute; a validation between them."""
    seconds = 0.0

    def passing(amount: float) -> None:
        nonlocal seconds
        seconds += amount

    clock = Clock(lambda: seconds)
    passing(100)
    clock.restart()
    for first, second in ((3, 4), (1, 0)):
        for wait in (first, second):
            with clock.waiting():
                passing(wait)
            passing(5)
        passing(7)
        clock.step_done(64)
        assert (clock.data_time, clock.batch_time) == (first + second, first + second + 17)
        with clock.waiting():
            passing(50)  # for pictures of a validation
        clock.restart()
    assert clock.samples_per_second() == 128 / (24 + 18)


def test_a_wait_that_a_signal_ends_is_a_wait() -> None:
    seconds = iter([0.0, 1.0, 3.0, 8.0])
    clock = Clock(lambda: next(seconds))
    with contextlib.suppress(StopWaiting), clock.waiting():
        raise StopWaiting
    clock.step_done(1)
    assert (clock.data_time, clock.batch_time) == (2, 8)
