"""What each flag of training changes in a run; `test_training_flags.py` names the test of every flag."""

import base64
import io
import json
import logging
import random
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_process_runs import BATCH, NUM_PAIRS, RATE, TOWERS, build, checkpoint, emoji_split, options, run
from PIL import Image
from training_runs import losses, train

from cn_clip import processes, ranks, zoo
from cn_clip.checkpoints import strip
from cn_clip.clip import Encoder, load_from_name
from cn_clip.clip.model import CLIP
from cn_clip.clip.transforms import ImageTransform, normalised
from cn_clip.clip.visual import ModifiedResNet
from cn_clip.clip.weights.checkpoint import read_checkpoint
from cn_clip.clip.weights.low_rank import is_adapter
from cn_clip.data.augment import Augmentation
from cn_clip.data.building import write_shards
from cn_clip.data.datasets import PairDataset
from cn_clip.data.lmdb_store import IMAGES, ImageStore, Pair, SplitWriter
from cn_clip.data.pictures import open_picture
from cn_clip.errors import CheckpointError, ConfigError, DataError
from cn_clip.eval import extract_features
from cn_clip.training import distributed, inputs
from cn_clip.training import trainer as trainer_module
from cn_clip.training.building import build_model, fsdp_type, synchronise_norms
from cn_clip.training.inputs import EpochNumbers, ShardSampler
from cn_clip.training.log_lines import Clock, arithmetic_words, compile_advice
from cn_clip.training.params import Options
from cn_clip.training.step import make_batch
from cn_clip.training.trainer import Trainer

CPU = torch.device("cpu")
NO_VALIDATION: dict[str, Any] = {"val_data": None}

pytestmark = pytest.mark.usefixtures("same_random_state")


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emoji_split(tmp_path_factory.mktemp("split"))


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def changed_by_an_update(trainer: Trainer) -> set[str]:
    """The names of the tensors that one update moves."""
    before = weights(trainer)
    trainer._set_training_mode()
    trainer._step(0, next(trainer._updates(0)))
    return {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}


def first_loss(trainer: Trainer) -> float:
    trainer._set_training_mode()
    return trainer.learner.backward(next(trainer._updates(0))).loss.item()


# --- data


def test_as_many_processes_load_as_asked(split: Path, tmp_path: Path) -> None:
    trainer = build(split, tmp_path, num_workers=2, valid_num_workers=1)
    assert trainer.validation is not None
    assert trainer.training.loader._batches.num_workers == 2
    assert trainer.validation.pixels._batches.num_workers == 1


@pytest.mark.parametrize("accum_freq", [1, 3])
def test_data_time_is_the_wait_for_pairs_and_nothing_of_the_device(
    accum_freq: int, split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pair takes 1 s to load, a batch of 4 takes 5 s to copy, a step 7 s."""
    seconds, load, copy = [0.0], PairDataset.__getitem__, make_batch
    trainer = build(split, tmp_path, accum_freq=accum_freq, val_data=None)
    trainer.report.clock = clock = Clock(lambda: sum(seconds))
    monkeypatch.setattr(PairDataset, "__getitem__", lambda *given: seconds.append(1) or load(*given))
    monkeypatch.setattr(trainer_module, "make_batch", lambda *given, **how: seconds.append(5) or copy(*given, **how))
    step = trainer._step
    monkeypatch.setattr(trainer, "_step", lambda *given: seconds.append(7) or step(*given))
    trainer._train_epoch(0)
    assert clock.data_time == 4 * accum_freq
    assert clock.batch_time == (4 + 5) * accum_freq + 7


@pytest.mark.parametrize("use_augment", [False, True])
def test_pixels_are_loaded_as_bytes_for_training_and_validation(use_augment: bool, split: Path, tmp_path: Path) -> None:
    trainer = build(split, tmp_path, use_augment=use_augment)
    (batch,) = next(trainer._updates(0))
    assert trainer.validation is not None
    (ids, validated), *_ = trainer.validation.pixels
    assert (batch.pixels_B3RR.dtype, validated.dtype) == (torch.uint8, torch.uint8)
    transform, stored = ImageTransform(64), ImageStore(split / IMAGES)

    def pixels(ids: list[Any]) -> torch.Tensor:
        return torch.stack([transform(open_picture(stored.picture(image_id))) for image_id in ids])

    assert torch.equal(normalised(validated), pixels(ids))
    trained = normalised(batch.pixels_B3RR)
    assert torch.equal(trained, pixels([image_id for image_id, _ in batch.ids])) is not use_augment


def test_fast_decoding_leaves_what_pictures_and_their_crops_need(tmp_path: Path) -> None:
    """A JPEG of 560 x 512: at 1/8 it has 70 x 64 pixels, enough for 64; a crop may need 72, so it comes at 1/4."""
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    coarse = Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
    coarse.resize((560, 512), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    with SplitWriter(tmp_path / "train") as writer:
        for number in range(4):
            writer.put_image(number, base64.b64encode(buffer.getvalue()))
            writer.put_pair(Pair(number, number, f"猫{number}"))
    data = buffer.getvalue()
    whole, half, fast = (open_picture(data, draft) for draft in (None, 72, 64))
    assert (half.size, fast.size) == ((140, 128), (70, 64))
    for use_augment, decode, image in ((False, "exact", whole), (False, "fast", fast), (True, "fast", half)):
        trainer = build(tmp_path / "train", tmp_path, decode=decode, use_augment=use_augment, batch_size=4)
        pixels = image
        if use_augment:
            pixels = Augmentation(64)(image, random.Random("123 0 0"))
        (batch,) = next(trainer._updates(0))
        place = [image_id for image_id, _ in batch.ids].index(0)
        expected = torch.from_numpy(ImageTransform(64).bytes(pixels))
        assert torch.equal(batch.pixels_B3RR[place], expected), (use_augment, decode)
        assert trainer.validation is not None
        (_, validated), *_ = trainer.validation.pixels
        expected = torch.from_numpy(ImageTransform(64).bytes(whole if decode == "exact" else fast))
        assert torch.equal(validated[0], expected)


@pytest.mark.parametrize(
    ("cores", "processes_here", "device", "training", "validation"),
    [
        (2, 1, "cpu", 2, 1),
        (16, 1, "cpu", 4, 1),
        (1, 4, "cpu", 1, 1),
        (2, 1, "cuda", 2, 2),
        (16, 1, "cuda", 8, 4),
        (16, 4, "cuda", 4, 4),
        (7, 8, "cuda", 1, 1),
    ],
)
def test_as_many_processes_load_as_there_are_cores_for_within_bounds(
    cores: int, processes_here: int, device: str, training: int, validation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "usable_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes_here))
    where = torch.device(device)
    assert inputs.num_loading(None, where, "--num-workers", **inputs.TRAINING_WORKERS) == training
    assert inputs.num_loading(None, where, "--valid-num-workers", **inputs.VALIDATION_WORKERS) == validation
    assert inputs.num_loading(0, where, "--num-workers", **inputs.TRAINING_WORKERS) == 0


def test_the_log_says_how_many_processes_load_when_nobody_did(
    split: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "usable_cores", lambda: 2)
    with caplog.at_level(logging.INFO):
        trainer = build(split, tmp_path, num_workers=None, valid_num_workers=None)
    assert "--num-workers: 2 (2 cores, 1 training on this machine)" in caplog.messages
    assert "--valid-num-workers: 1 (2 cores, 1 training on this machine)" in caplog.messages
    assert trainer.training.loader._batches.num_workers == 2


def test_the_order_of_shards_does_not_depend_on_the_cores_of_the_machine(
    tmp_path: Path, split: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(split, tmp_path / "shards", pairs_per_shard=1, num_shards=4, seed=1, overwrite=False)
    orders = [list(EpochNumbers(ShardSampler([3] * 4, 2, seed=123, num_workers=4)))]
    for cores in (1, 2):
        monkeypatch.setattr(processes, "usable_cores", lambda cores=cores: cores)
        chosen = options(tmp_path / "shards" / "*.tar", tmp_path, num_workers=None, batch_size=2)
        orders.append(list(EpochNumbers(inputs.training_data(chosen, 64, CPU).sampler)))
    assert orders[0] == orders[1] == orders[2]


def test_texts_are_cut_to_the_context_length_in_training_and_validation(split: Path, tmp_path: Path) -> None:
    trainer = build(split, tmp_path, context_length=3)
    (batch,) = next(trainer._updates(0))
    assert {(row[0], row[2], len(row)) for row in batch.tokens_BL.tolist()} == {(101, 102, 3)}
    assert trainer.validation is not None
    assert {len(row) for row in trainer.validation.tokens} == {3}


@pytest.mark.long
def test_the_context_length_of_the_training_is_that_of_the_checkpoint_wherever_it_is_opened(
    split: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = ["一张画着许多可爱小动物的表情图片"]
    run(split, tmp_path, context_length=6, max_epochs=1, valid_step_interval=1)
    folder = tmp_path / "x" / "checkpoints"
    latest = str(folder / "epoch_latest.pt")
    assert {torch.load(path, weights_only=True)["context_length"] for path in folder.iterdir()} == {6}
    stripped, exported = str(tmp_path / "stripped.pt"), {"backend": "onnx", "download_root": tmp_path / "root"}
    strip.run(strip.Options(file=latest, output=stripped))
    asked, longer = Encoder(latest, context_length=6), Encoder(latest, context_length=52)
    assert "context length 52: " in caplog.text
    expected = asked.encode_texts(text)
    assert not np.allclose(longer.encode_texts(text), expected, atol=1e-3)
    for encoder in (Encoder(latest), Encoder(stripped), Encoder(latest, **exported)):
        assert encoder.context_length == 6
        np.testing.assert_allclose(encoder.encode_texts(text), expected, atol=1e-5)

    content = torch.load(latest, weights_only=True)
    del content["context_length"]
    torch.save(content, tmp_path / "theirs.pt")
    assert Encoder(tmp_path / "theirs.pt").context_length == 52
    torch.save({**content, "context_length": "6"}, tmp_path / "wrong.pt")
    with pytest.raises(CheckpointError, match=r"wrong\.pt: context_length is '6', expected an integer from 3 to 512"):
        Encoder(tmp_path / "wrong.pt")


def test_a_run_that_goes_on_keeps_its_context_length_unless_another_is_asked_for(
    split: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(split, tmp_path, context_length=6, max_steps=1, **NO_VALIDATION)
    folder = tmp_path / "x" / "checkpoints"
    assert build(split, folder).options.context_length == 6
    assert "context length" not in caplog.text
    assert build(split, tmp_path, init=str(folder / "epoch_latest.pt"), context_length=20).options.context_length == 20
    assert "epoch_latest.pt was trained with texts of at most 6 tokens" in caplog.text


@pytest.mark.parametrize(("given", "expected"), [([], 6), (["--context-length=52"], 52)])
def test_features_cut_texts_as_the_checkpoint_was_trained(
    given: list[str], expected: int, split: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(split, tmp_path, context_length=6, max_steps=1, **NO_VALIDATION)
    latest = str(tmp_path / "x" / "checkpoints" / "epoch_latest.pt")
    sentence = "一张画着许多可爱小动物的表情图片"
    texts = tmp_path / "test_texts.jsonl"
    texts.write_text(json.dumps({"text_id": 1, "text": sentence, "image_ids": [1]}) + "\n", encoding="utf-8")
    extract_features.main(
        ["--extract-text-feats", f"--text-data={texts}", f"--resume={latest}", "--device=cpu", *given]
    )
    (row,) = map(json.loads, (tmp_path / "test_texts.txt_feat.jsonl").read_text(encoding="utf-8").splitlines())
    vectors = Encoder(latest, context_length=expected).encode_texts([sentence])
    np.testing.assert_allclose(row["feature"], vectors[0], atol=1e-6)
    assert ("context length 52: " in caplog.text) is (expected == 52)


def test_augmentation_varies_training_pictures_and_no_others(split: Path, tmp_path: Path) -> None:
    plain, varied = (build(split, tmp_path, use_augment=use) for use in (False, True))
    ((first,), (second,)) = (next(trainer._updates(0)) for trainer in (plain, varied))
    assert first.ids == second.ids
    assert not torch.equal(first.pixels_B3RR, second.pixels_B3RR)
    assert plain.validation is not None
    assert varied.validation is not None
    pairs = zip(plain.validation.pixels, varied.validation.pixels, strict=True)
    assert all(torch.equal(one[1], other[1]) for one, other in pairs)


def test_the_seed_decides_weights_and_order(split: Path, tmp_path: Path) -> None:
    trainers = [build(split, tmp_path, seed=seed) for seed in (1, 1, 2)]
    first, same, other = ([batch.ids for batches in t._updates(0) for batch in batches] for t in trainers)
    assert first == same
    assert first != other
    one, again, another = (trainer.model.state_dict()["visual.proj"] for trainer in trainers)
    assert torch.equal(one, again)
    assert not torch.equal(one, another)


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_corrupt_picture_stops_the_run_by_its_name_or_is_passed_over_and_counted(
    on_error: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = emoji_split(tmp_path / "lmdb", corrupt=5)
    settings = {"max_epochs": 1, "on_error": on_error, **NO_VALIDATION}
    if on_error == "stop":
        with pytest.raises(DataError, match=r"imgs: image id \d+: "):
            run(broken, tmp_path, **settings)
        return
    log = run(broken, tmp_path, **settings)
    assert "Global Steps: 3/3" in log
    assert re.search(r"skipped: .*imgs: image id \d+: ", log)
    assert "1 pictures could not be read in this run and were passed over." in log


# --- the model


def test_the_towers_are_those_named() -> None:
    model = build_model(Options(train_data="x", vision_model="RN-Tiny-64", text_model="RBT3-chinese"), CPU)
    assert isinstance(model.visual, ModifiedResNet)
    assert (len(model.bert.encoder.layer), model.text_projection.shape[0]) == (3, 768)


def test_patches_are_left_out_in_training_and_not_in_validation(split: Path, tmp_path: Path) -> None:
    trainer = build(split, tmp_path, mask_ratio=0.5)
    lengths = []
    trainer.model.visual.transformer.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[0]))
    changed_by_an_update(trainer)
    trainer.validate(0)
    assert set(lengths[:1]) == {1 + 32}  # of 8 x 8 patches
    assert set(lengths[1:]) == {1 + 64}


def test_a_resnet_says_which_flags_it_cannot_obey(caplog: pytest.LogCaptureFixture) -> None:
    small = {**TOWERS, "vision_model": "RN-Tiny-64"}
    build_model(Options(train_data="x", mask_ratio=0.5, grad_checkpointing=True, **small), CPU)
    assert "--mask-ratio changes nothing: a ResNet (--vision-model) has no patches to leave out." in caplog.text
    assert "--grad-checkpointing works only on the text tower: this --vision-model is a ResNet." in caplog.text


def test_both_towers_recompute_activations_when_asked() -> None:
    for asked in (False, True):
        model = build_model(Options(train_data="x", grad_checkpointing=asked, **TOWERS), CPU)
        assert model.visual.transformer.grad_checkpointing is asked
        assert model.bert.encoder.grad_checkpointing is asked


def test_the_flash_attention_flag_is_taken_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    build_model(Options(train_data="x", use_flash_attention=True, **TOWERS), CPU)
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.message.startswith("--use-flash-attention changes nothing: ")


@pytest.mark.parametrize(("precision", "expected"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_precision_is_that_of_the_products(
    precision: str, expected: torch.dtype, split: Path, tmp_path: Path
) -> None:
    trainer = build(split, tmp_path, precision=precision)
    with trainer.learner.autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == expected
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("device", "precision", "asked", "expected"),
    [
        ("cuda", "auto", "auto", True),
        ("cuda", "amp", "auto", True),
        ("cuda", "amp", "fp32", False),
        ("cpu", "auto", "auto", False),
        ("cpu", "amp", "training", True),
        ("cpu", "bf16", "auto", True),
        ("cpu", "bf16", "fp32", False),
    ],
)
def test_validation_has_the_arithmetic_of_the_training_on_gpus_and_where_it_is_asked_for(
    device: str, precision: Any, asked: Any, expected: bool
) -> None:
    options = Options(train_data="x", precision=precision, valid_precision=asked)
    assert options.validates_as_trained(device) is expected


@pytest.mark.parametrize(("asked", "dtype"), [("training", torch.bfloat16), ("fp32", torch.float32)])
def test_validation_has_the_arithmetic_asked_for(asked: str, dtype: torch.dtype, split: Path, tmp_path: Path) -> None:
    trainer = build(split, tmp_path, precision="bf16", valid_precision=asked)
    with trainer.validation_autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_validation_in_float32_of_a_model_in_float16_is_refused() -> None:
    with pytest.raises(ConfigError, match="--valid-precision fp32 and --precision fp16: the weights are float16"):
        Options(train_data="x", precision="fp16", valid_precision="fp32")


def test_the_log_says_what_is_computed_in() -> None:
    def words(mixed: torch.dtype | None, weights: torch.dtype = torch.float32, *, tf32: bool = False) -> list[str]:
        return [arithmetic_words(mixed, weights, validates_in_float32=one, is_tf32=tf32) for one in (False, True)]

    assert words(torch.bfloat16) == ["mixed bfloat16", "mixed bfloat16, validation float32"]
    assert words(torch.float16, tf32=True)[1] == "mixed float16, validation float32 (TF32 products)"
    assert words(None) == ["float32", "float32"]
    assert words(None, tf32=True) == ["float32 (TF32 products)"] * 2
    assert words(None, torch.float16)[0] == "float16"


def test_strict_float32_reaches_the_setting_of_the_process(
    split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict: list[bool] = []
    monkeypatch.setattr(ranks, "set_float32_products", lambda _, is_strict: strict.append(is_strict))
    for asked in (False, True):
        run(split, tmp_path, name=str(asked), max_steps=1, strict_fp32=asked, **NO_VALIDATION)
    assert strict == [False, True]
    with pytest.raises(ConfigError, match="--strict-fp32: is for float32; it needs --precision fp32"):
        Options(train_data="x", strict_fp32=True)


def test_fsdp_gathers_bfloat16_on_gpus_where_products_are_in_it() -> None:
    half, gpu = torch.bfloat16, torch.device("cuda", 0)
    split, whole = Options(train_data="x", fsdp=True), Options(train_data="x")
    cases = [
        (split, gpu, half),
        (split, gpu, torch.float16),
        (split, gpu, None),
        (split, CPU, half),
        (whole, gpu, half),
        (Options(train_data="x", fsdp=True, vision_model="RN50", val_data="y", valid_precision="fp32"), gpu, half),
    ]
    assert [fsdp_type(*case) for case in cases] == [half, None, None, None, None, None]
    refused = Options(train_data="x", fsdp=True, val_data="y", valid_precision="fp32")
    with pytest.raises(ConfigError, match="--fsdp and --valid-precision fp32: FSDP gathers the weights in bfloat16"):
        fsdp_type(refused, gpu, half)


def test_compiling_takes_each_block_of_both_towers(
    split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    trainer = build(split, tmp_path, compile=True)
    assert len(compiled) == 2 + 2
    assert compiled == distributed.blocks(trainer.model)


def test_a_run_says_when_it_compiles_for_training_and_for_validation(
    split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "compile_blocks", lambda _: None)
    log = run(split, tmp_path, max_steps=2, compile=True, valid_step_interval=1)
    assert re.findall(r"--compile: compiling the towers for (\w+), which may take minutes", log) == [
        "validation",
        "training",
    ]
    assert "--compile" not in run(split, tmp_path, name="plain", max_steps=1, valid_step_interval=1)


def test_compiling_is_advised_for_long_runs_on_a_gpu() -> None:
    advice = compile_advice(501, compiles=False, device_type="cuda")
    assert advice is not None
    assert advice.startswith("--compile may make the 501 steps to come faster")
    assert compile_advice(500, compiles=False, device_type="cuda") is None
    assert compile_advice(501, compiles=True, device_type="cuda") is None
    assert compile_advice(501, compiles=False, device_type="cpu") is None


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_a_plain_one(split: Path, tmp_path: Path, device: torch.device) -> None:
    run = ("--batch-size=4", "--max-steps=2", "--freeze-text")
    plain, compiled = (
        train(split, tmp_path, f"--name=x{flag}", f"--device={device.type}", *run, *flag.split())
        for flag in ("", "--compile")
    )
    assert compiled.returncode == 0, compiled.stderr
    # No dropout where the text tower is frozen: the same arithmetic in another order.
    expected = pytest.approx([float(loss) for loss in losses(plain.stderr)], rel=1e-4 if device.type == "cpu" else 2e-3)
    assert [float(loss) for loss in losses(compiled.stderr)] == expected
    files = [tmp_path / name / "checkpoints" / "epoch_latest.pt" for name in ("x", "x--compile")]
    first, second = (torch.load(file, weights_only=True)["state_dict"].keys() for file in files)
    assert first == second


# --- what is trained


def test_a_frozen_text_tower_stays_and_the_rest_moves(split: Path, tmp_path: Path) -> None:
    changed = changed_by_an_update(build(split, tmp_path, freeze_text=True))
    assert not [name for name in changed if name.startswith("bert.")]
    assert {"text_projection", "logit_scale", "visual.proj"} <= changed


def test_frozen_text_layers_stay_and_the_later_ones_move(split: Path, tmp_path: Path) -> None:
    changed = changed_by_an_update(build(split, tmp_path, freeze_text_layers=1))
    assert not [name for name in changed if name.startswith(("bert.embeddings.", "bert.encoder.layer.0."))]
    assert "bert.encoder.layer.1.output.dense.weight" in changed


def test_two_stages_train_the_text_tower_first_and_then_both(split: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    parts = CLIP.from_config(zoo.model_config(**{k.removesuffix("_model"): v for k, v in TOWERS.items()})).state_dict()
    clip = {name: value for name, value in parts.items() if name.startswith("visual.") or name == "logit_scale"}
    bert = {name: value for name, value in parts.items() if name.startswith("bert.")}
    torch.save(clip, tmp_path / "clip.pt")
    torch.save(bert, tmp_path / "bert.bin")
    files = {"clip_weight_path": str(tmp_path / "clip.pt"), "bert_weight_path": str(tmp_path / "bert.bin")}
    begin = build(split, tmp_path / "nothing", **files).model.state_dict()
    assert all(torch.equal(begin[name], value) for name, value in {**clip, **bert}.items())

    run(split, tmp_path, name="one", freeze_vision=True, max_steps=1, **files, **NO_VALIDATION)
    first = checkpoint(tmp_path, "one")["state_dict"]
    assert all(torch.equal(first[f"module.{name}"], value) for name, value in clip.items() if name != "logit_scale")
    layer = "bert.encoder.layer.1.output.dense.weight"
    assert not torch.equal(first[f"module.{layer}"], bert[layer])

    resume = str(tmp_path / "one" / "checkpoints" / "epoch_latest.pt")
    flags = {"resume": resume, "reset_optimizer": True, "reset_data_offset": True}
    log = run(split, tmp_path, name="two", max_steps=1, **flags, **NO_VALIDATION)
    assert "Global Steps: 1/1 " in log
    second = checkpoint(tmp_path, "two")["state_dict"]
    assert not torch.equal(second["module.visual.proj"], first["module.visual.proj"])
    # One step of AdamW moves a weight by the rate at most: stage 2 began where stage 1 ended.
    assert (second["module.visual.proj"] - first["module.visual.proj"]).abs().max() < 2 * RATE
    assert (second[f"module.{layer}"] - first[f"module.{layer}"]).abs().max() < 2 * RATE


def test_adapters_are_trained_kept_apart_in_the_file_and_merged_when_it_is_loaded(split: Path, tmp_path: Path) -> None:
    run(split, tmp_path, lora_rank=2, lora_alpha=3.0, max_steps=2, **NO_VALIDATION)
    content = checkpoint(tmp_path)
    assert content["lora"] == {"rank": 2, "alpha": 3.0}
    tensors = {name.removeprefix("module."): value for name, value in content["state_dict"].items()}
    begin = build(split, tmp_path / "nothing").model.state_dict()
    moved = {name for name, value in tensors.items() if not is_adapter(name) and not torch.equal(begin[name], value)}
    assert moved == {"logit_scale"}
    loaded, _ = load_from_name(str(tmp_path / "x" / "checkpoints" / "epoch_latest.pt"), device="cpu")
    stem = "bert.encoder.layer.0.attention.self.query"
    adapters = [tensors[f"{stem}.lora_{half}.weight"] for half in "BA"]
    expected = tensors[f"{stem}.weight"] + 3.0 / 2 * adapters[0] @ adapters[1]
    torch.testing.assert_close(loaded.state_dict()[f"{stem}.weight"], expected)
    assert not torch.equal(expected, tensors[f"{stem}.weight"])


# --- the loss


def test_the_sigmoid_loss_keeps_its_bias_over_a_resume_and_out_of_the_model(split: Path, tmp_path: Path) -> None:
    run(split, tmp_path, loss="siglip", max_epochs=1, **NO_VALIDATION)
    content = checkpoint(tmp_path)
    assert "module.logit_bias" not in content["state_dict"]
    bias = content["resume"]["logit_bias"]
    assert bias != -10.0
    loaded, _ = load_from_name(str(tmp_path / "x" / "checkpoints" / "epoch_latest.pt"), device="cpu")
    assert not hasattr(loaded, "logit_bias") or loaded.logit_bias is None
    resume = str(tmp_path / "x" / "checkpoints" / "epoch_latest.pt")
    trainer = build(split, tmp_path / "again", loss="siglip", max_epochs=2, resume=resume)
    assert trainer.model.logit_bias is not None
    assert torch.equal(trainer.model.logit_bias, bias)
    assert "Global Steps: 4/6" in run(split, tmp_path, loss="siglip", max_epochs=2, **NO_VALIDATION)


def test_vectors_may_be_cut_where_a_run_was_told_so(split: Path, tmp_path: Path) -> None:
    whole, cut = (build(split, tmp_path / str(one), matryoshka=one) for one in (None, "64,32,256"))
    assert cut.learner.objective.dimensions == (32, 64), "256 is the whole vector"
    assert first_loss(cut) != pytest.approx(first_loss(whole), abs=1e-4)
    run(split, tmp_path, matryoshka="64,32", max_epochs=1, **NO_VALIDATION)
    file = tmp_path / "x" / "checkpoints" / "epoch_latest.pt"
    assert torch.load(file, weights_only=True)["matryoshka"] == [32, 64]
    assert read_checkpoint(file).matryoshka == (32, 64)


@pytest.mark.parametrize("given", ["", "64,", "64,64", "0,64", "64,513", "64;128", "-1", "a"])
def test_what_names_no_beginnings_of_vectors_is_refused(given: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--matryoshka .*: expected different numbers from 1 to 512"):
        Options(train_data=str(tmp_path), matryoshka=given)


def test_pairs_of_one_text_are_no_negatives_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All pairs share their text: nothing is left to tell apart, and the loss is 0."""
    monkeypatch.setattr(inputs, "_require_two", lambda *_: None)
    split = emoji_split(tmp_path / "lmdb", same_text=True)
    plain, aware = (build(split, tmp_path, multi_positive=use) for use in (False, True))
    assert first_loss(plain) > 1
    assert first_loss(aware) == pytest.approx(0, abs=1e-6)
    log = run(split, tmp_path, multi_positive=True, max_epochs=1, **NO_VALIDATION)
    assert log.count("the loss is 0, so this step trains nothing") == 1


@pytest.mark.parametrize(("settings", "same"), [({"same_text": True}, "text"), ({"same_picture": True}, "picture")])
@pytest.mark.parametrize("length", [52, 3])
def test_data_that_leave_nothing_to_tell_apart_are_refused(
    settings: dict[str, bool], same: str, length: int, tmp_path: Path
) -> None:
    split = emoji_split(tmp_path / "lmdb", **settings)
    with pytest.raises(DataError, match=f"lmdb: all {NUM_PAIRS} pairs have the same {same}"):
        build(split, tmp_path, context_length=length)


def test_a_teacher_may_teach_pictures_of_one_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    split = emoji_split(tmp_path / "lmdb", same_text=True)
    build(split, tmp_path, distillation=True, teacher_model_name="Emoji-Tiny")
    assert "have the same text: there is nothing to tell apart, only --distillation teaches" in caplog.text


def test_the_teacher_is_learned_from_with_its_weight(split: Path, tmp_path: Path) -> None:
    run(split, tmp_path, name="teacher", max_steps=1, seed=7, **NO_VALIDATION)
    teacher = str(tmp_path / "teacher" / "checkpoints" / "epoch_latest.pt")
    taught: dict[str, Any] = {"distillation": True, "teacher_model_name": teacher}
    plain = first_loss(build(split, tmp_path))
    half, whole = (first_loss(build(split, tmp_path, **taught, kd_loss_weight=weight)) for weight in (0.5, 1.0))
    assert half > plain
    assert whole - plain == pytest.approx(2 * (half - plain), rel=1e-3)
    log = run(split, tmp_path, name="student", max_steps=1, **taught, **NO_VALIDATION)
    assert f"Teacher model loaded from {teacher} (64 features)" in log
    assert checkpoint(tmp_path, "student")["state_dict"].keys() == checkpoint(tmp_path, "teacher")["state_dict"].keys()


@pytest.mark.parametrize(
    ("settings", "gather"),
    [({}, "values"), ({"gather_with_grad": True}, "gradients"), ({"skip_aggregate": True}, "none")],
)
def test_features_are_gathered_as_asked(settings: dict[str, bool], gather: str, split: Path, tmp_path: Path) -> None:
    assert build(split, tmp_path, **settings).learner.gather == gather


def test_the_local_loss_is_of_all_features_and_of_several_processes(
    split: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match="--local-loss: needs --gather-with-grad"):
        Options(train_data="x", local_loss=True)
    assert build(split, tmp_path, gather_with_grad=True, local_loss=True).learner.local_loss
    assert "--local-loss changes nothing: there is one process." in caplog.text


def test_batches_are_joined_into_one_update(split: Path, tmp_path: Path) -> None:
    trainer = build(split, tmp_path, batch_size=2, accum_freq=3)
    assert [len(batches) for batches in trainer._updates(0)] == [3, 3]
    assert (trainer.steps_per_epoch, trainer.global_batch) == (2, 6)


# --- the optimizer


def test_rate_betas_epsilon_and_decay_reach_the_optimizer(split: Path, tmp_path: Path) -> None:
    trainer = build(split, tmp_path, lr=3e-4, beta1=0.8, beta2=0.95, eps=1e-7, wd=0.03)
    free, decayed = trainer.optimizer.param_groups
    for group in (free, decayed):
        assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.8, 0.95), 1e-7)
    assert (free["weight_decay"], decayed["weight_decay"]) == (0.0, 0.03)


def test_the_rate_rises_over_the_warm_up(split: Path, tmp_path: Path) -> None:
    trainer = build(split, tmp_path, warmup=2, max_steps=6)
    assert [trainer._rate(step) for step in range(3)] == [RATE / 2, RATE, RATE]


def test_norms_are_synchronised_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    synchronised = Options(train_data="x", use_bn_sync=True, **{**TOWERS, "vision_model": "RN-Tiny-64"})
    model = build_model(synchronised, CPU)
    monkeypatch.setenv("WORLD_SIZE", "2")
    norms = [name for name, one in model.named_modules() if isinstance(one, torch.nn.BatchNorm2d)]
    model = synchronise_norms(synchronised, model, torch.device("cuda", 0))
    assert norms
    assert all(isinstance(model.get_submodule(name), torch.nn.SyncBatchNorm) for name in norms)


def test_norms_are_not_synchronised_where_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    synchronised = Options(train_data="x", use_bn_sync=True, **{**TOWERS, "vision_model": "RN-Tiny-64"})
    model = build_model(synchronised, CPU)
    assert "--use-bn-sync changes nothing: there is one process." in caplog.text
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="--use-bn-sync: PyTorch has it for CUDA alone, the device is cpu"):
        synchronise_norms(synchronised, model, CPU)


# --- the run


def test_logs_validations_and_files_come_at_the_intervals_asked_for(split: Path, tmp_path: Path) -> None:
    intervals = {"log_interval": 2, "valid_step_interval": 4, "valid_epoch_interval": 2, "save_epoch_frequency": 2}
    log = run(split, tmp_path, max_epochs=3, **intervals)
    assert re.findall(r"Global Steps: (\d+)/9", log) == ["2", "4", "6", "8"]
    assert re.findall(r"Validation Result \(epoch \d @ (\d+) steps\)", log) == ["0", "4", "6", "8", "9"]
    assert "Global Steps: 2/9 | Train Epoch: 1 [8/12 (67%)] | Loss: " in log
    assert "Text2Image Acc" not in "".join(line for line in log.splitlines() if "Global Steps" in line)
    files = {path.name for path in (tmp_path / "x" / "checkpoints").iterdir()}
    assert files - {"epoch_best.pt"} == {"epoch2.pt", "epoch3.pt", "epoch_latest.pt"}


def test_accuracy_inside_the_training_batch_is_logged_when_asked(split: Path, tmp_path: Path) -> None:
    log = run(split, tmp_path, max_steps=1, report_training_batch_acc=True, **NO_VALIDATION)
    found = re.search(r"Global Steps: 1/1 .* \| Image2Text Acc: ([\d.]+) \| Text2Image Acc: ([\d.]+) \|", log)
    assert found is not None
    assert {float(share) * BATCH / 100 for share in found.groups()} <= set(range(BATCH + 1))


@pytest.mark.parametrize("debug", [False, True])
def test_debugging_logs_the_pairs_of_each_step(debug: bool, split: Path, tmp_path: Path) -> None:
    log = run(split, tmp_path, max_steps=1, debug=debug, **NO_VALIDATION)
    found = re.findall(r"DEBUG \| Rank 0 \| Step 1: \(image id, text id\) of the batch: (.*)", log)
    assert len(found) == int(debug)
    assert all(line.count("(") == BATCH for line in found)


def test_a_run_writes_under_its_name_with_all_of_its_settings(
    split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    log = run(split, tmp_path / "logs", name="mine", max_steps=1, num_threads=3, device="cpu", **NO_VALIDATION)
    assert threads == [3]
    assert "Use device: cpu for training, precision float32" in log
    assert "Validation" not in log
    (params,) = (tmp_path / "logs" / "mine").glob("params_*.txt")
    written = dict(line.split(": ", 1) for line in params.read_text(encoding="utf-8").splitlines())
    assert set(written) >= {field.name for field in fields(Options)}
    assert (written["name"], written["device"], written["max_steps"]) == ("mine", "cpu", "1")
    assert (written["beta2"], written["lora_rank"]) == ("0.98", "0")


def test_events_for_tensorboard_are_written_when_asked(split: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(split, tmp_path, max_steps=2, report_to="tensorboard")
    events = EventAccumulator(str(tmp_path / "x" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
    records = [json.loads(line) for line in (tmp_path / "x" / "metrics.jsonl").read_text().splitlines()]
    logged = [record["loss"] for record in records if record["kind"] == "train"]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(logged, rel=1e-6)


def test_a_run_with_all_of_its_data_sees_every_pair_once_an_epoch(split: Path, tmp_path: Path) -> None:
    trainer = build(split, tmp_path)
    ids = [pair for batches in trainer._updates(0) for batch in batches for pair in batch.ids]
    assert len(ids) == len(set(ids)) == NUM_PAIRS
