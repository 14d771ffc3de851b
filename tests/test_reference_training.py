"""Programs that train with Chinese-CLIP's own functions: data, loss, an epoch, a validation, rates and the log."""

import copy
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dataset_files import GOLDEN_LMDB
from deterministic import SMALL_MODEL, state_dict, training_batches
from in_process_runs import emoji_split
from PIL import Image
from torch import nn

from cn_clip import ranks
from cn_clip.clip.model import CLIP
from cn_clip.errors import ConfigError, DataError
from cn_clip.training import data, main, params, scheduler, train

GOLDEN = Path(__file__).parent / "golden"
SPLIT = str(GOLDEN_LMDB / "lmdb" / "train")


@pytest.fixture(scope="module")
def faces() -> Any:
    return np.load(GOLDEN / "faces.npz")


@pytest.fixture
def model() -> CLIP:
    model = CLIP(**SMALL_MODEL)
    shapes = [(name, tuple(value.shape)) for name, value in model.state_dict().items()]
    model.load_state_dict({name: torch.from_numpy(value) for name, value in state_dict(shapes).items()})
    return model.float().eval()


def arguments(**changes: Any) -> Any:
    """What a program's own `args` hold at least."""
    settings: dict[str, Any] = {"accum_freq": 1, "distillation": False, "aggregate": True, "gather_with_grad": False}
    settings |= {"report_training_batch_acc": True, "freeze_vision": False, "precision": "fp32", "mask_ratio": 0}
    settings |= {"max_steps": 5, "rank": 0, "world_size": 1, "log_interval": 1, "val_data": None, "name": "mine"}
    settings |= {"valid_step_interval": None, "should_save": False, "save_step_frequency": -1, "local_device_rank": 0}
    return SimpleNamespace(**{**settings, **changes})


class Batches(list):  # type: ignore[type-arg]
    """A loader as a program makes its own: five batches of eight pairs."""

    num_batches, num_samples = 5, 40


def batches() -> Batches:
    return Batches(
        (torch.from_numpy(pixels), torch.from_numpy(tokens), torch.zeros(len(tokens)))
        for pixels, tokens in training_batches()
    )


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    free = [p for n, p in model.named_parameters() if any(part in n for part in ("bn", "ln", "bias", "logit_scale"))]
    rest = [p for p in model.parameters() if not any(p is one for one in free)]
    groups = [{"params": free, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.2}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), eps=1e-6)


# --- data


def test_items_are_those_of_the_reference(faces: Any) -> None:
    dataset = data.LMDBDataset(SPLIT, max_txt_length=12, resolution=32)
    items = [dataset[number] for number in range(len(dataset))]
    assert (dataset.number_samples, dataset.number_images, dataset.split) == (4, 4, "val")
    np.testing.assert_array_equal(torch.stack([pixels for pixels, _, _ in items]).numpy(), faces["pixels"])
    np.testing.assert_array_equal(torch.stack([tokens for _, tokens, _ in items]).numpy(), faces["tokens"])
    assert [end for _, _, end in items] == faces["ends"].tolist()
    assert all(tokens[end] == 102 for _, tokens, end in items)  # [SEP]


def test_a_padded_dataset_begins_again() -> None:
    dataset = data.LMDBDataset(SPLIT, resolution=8)
    data.pad_dataset(dataset, 3)
    assert (len(dataset), dataset.dataset_len, dataset.global_batch_size) == (6, 6, 3)
    assert torch.equal(dataset[5][0], dataset[1][0])


def test_transactions_of_the_lmdb_are_there_for_programs_that_read_it_themselves() -> None:
    dataset = data.LMDBDataset(SPLIT)
    assert int(dataset.txn_pairs.get(key=b"num_samples").tobytes().decode("utf-8")) == 4
    assert dataset.txn_imgs.get(b"10").tobytes().startswith(b"iVBOR")


def test_a_transform_of_ones_own_is_used_and_augmentation_varies_the_picture(tmp_path: Path) -> None:
    split = str(emoji_split(tmp_path))
    dataset = data.LMDBDataset(split, "train", 64, True, 64)
    assert dataset.max_txt_length == 64
    assert len({dataset[0][0].sum().item() for _ in range(4)}) > 1
    assert torch.equal(*(data.LMDBDataset(split, "val", 64, True, 64)[0][0] for _ in range(2)))
    dataset.transform = lambda image: torch.tensor(image.size)
    assert dataset[0][0].tolist() == [64, 64]


@pytest.mark.parametrize("missing", ["", "imgs", "pairs"])
def test_a_missing_folder_is_an_assertion_error_that_names_it(missing: str, tmp_path: Path) -> None:
    for name in {"imgs", "pairs"} - {missing}:
        (tmp_path / "split" / name).mkdir(parents=True)
    with pytest.raises(AssertionError, match=rf"{missing or 'none'}: no such folder"):
        data.LMDBDataset(str(tmp_path / ("split" if missing else "none")))
    with pytest.raises(AssertionError, match=r"args\.val_data is None"):
        data.get_dataset(SimpleNamespace(val_data=None), is_train=False)


def test_loaders_give_the_order_counts_and_texts_of_the_reference(faces: Any) -> None:
    args = SimpleNamespace(
        train_data=SPLIT, val_data=SPLIT, batch_size=3, valid_batch_size=2, num_workers=0, valid_num_workers=0, seed=5,
        use_augment=False, vision_model="ViT-B-16",
    )  # fmt: skip
    found = data.get_data(args, epoch_id=1, max_txt_length=12)
    assert sorted(found) == ["train", "val"]
    for name, info in found.items():
        assert list(info.sampler) == faces[f"order_{name}"].tolist()
        assert (info.dataloader.num_samples, info.dataloader.num_batches) == tuple(faces[f"counts_{name}"])
        pixels, texts, ends = map(torch.cat, zip(*info.dataloader, strict=True))
        np.testing.assert_array_equal(texts.numpy(), faces[f"texts_{name}"])
        assert pixels.shape == (len(texts), 3, 224, 224)
        assert ends.dtype == torch.int64
        assert info.epoch_id == 1
        assert info.dataset.split == name
    args.val_data = None
    assert sorted(data.get_data(args)) == ["train"]


def test_processes_share_the_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        args = SimpleNamespace(train_data=SPLIT, batch_size=1, num_workers=0, seed=5, use_augment=False)
        args.vision_model = "ViT-B-16"
        shares.append(list(data.get_dataset(args, is_train=True).sampler))
    assert sorted(shares[0] + shares[1]) == [0, 1, 2, 3]


def test_small_helpers() -> None:
    assert data._preprocess_text("“A”") == '"a"'
    assert data._convert_to_rgb(Image.new("L", (2, 2))).mode == "RGB"
    assert (data.fetch_resolution("ViT-L-14-336"), data.fetch_resolution("ViT-L/14")) == (336, 224)
    assert data._tokenizer.vocab["[SEP]"] == 102


# --- the learning rate, and AdamW's settings


def test_the_rate_warms_up_and_falls_along_a_cosine() -> None:
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(2)]}], lr=9.0)
    schedule = scheduler.cosine_lr(optimizer, 1e-3, 2, 5)
    rates = [schedule(step) for step in range(6)]
    # (step + 1) / 2 of the rate, then (1 + cos 0, 60, 120, 180 degrees) / 2 of it
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3, 7.5e-4, 2.5e-4, 0])
    assert [group["lr"] for group in optimizer.param_groups] == [rates[-1]] * 2
    scheduler.assign_learning_rate(optimizer, new_lr=0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
    assert scheduler._warmup_lr(base_lr=1.0, warmup_length=4, step=2) == 0.75


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("RN50", (5e-4, 0.9, 0.999, 1e-8)),
        ("RN101", (5e-4, 0.9, 0.999, 1e-8)),
        ("RN50x4", (5e-4, 0.9, 0.999, 1e-8)),
        ("ViT-B-32", (5e-4, 0.9, 0.98, 1e-6)),
        ("ViT-H-14", (5e-4, 0.9, 0.98, 1e-6)),
        ("ViT-L-14", (4e-4, 0.9, 0.98, 1e-6)),
        ("ViT-L-14-336", (4e-4, 0.9, 0.98, 1e-6)),
        ("ViT-Tiny-64", (5e-4, 0.9, 0.98, 1e-6)),
    ],
)
def test_default_params_of_a_tower(name: str, settings: tuple[float, ...]) -> None:
    assert params.get_default_params(name) == dict(zip(("lr", "beta1", "beta2", "eps"), settings, strict=True))


def test_an_unknown_tower_has_no_default_params_and_the_dictionary_is_the_callers() -> None:
    assert params.get_default_params("ViT-X") == {}
    params.get_default_params("RN50")["lr"] = 7
    assert params.get_default_params("RN50")["lr"] == 5e-4


def test_arguments_are_a_namespace_with_what_the_tower_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--train-data", "x", "--vision-model", "RN50", "--lr", "1e-5", "--skip-aggregate", "--mask-ratio=0.5"]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    for module in (params, main):
        args = module.parse_args()
        assert (args.lr, args.beta2, args.eps, args.aggregate, args.mask_ratio) == (1e-5, 0.999, 1e-8, False, 0.5)
    args.device = torch.device("cpu")  # programs write into it
    assert main.is_master(SimpleNamespace(rank=0))
    assert not main.is_master(SimpleNamespace(rank=1))


@pytest.mark.parametrize(
    ("versions", "expected"),
    [(("1.8.0", "1.8.0"), True), (("1.7.1+cu110", "1.8.0"), True), (("2.10.0+cpu", "2.9.1"), False)],
)
def test_versions_are_compared_as_numbers(versions: tuple[str, str], expected: bool) -> None:
    assert main.torch_version_str_compare_lessequal(*versions) is expected
    with pytest.raises(AssertionError, match=r"expected a version such as 2\.6\.0, got '1\.8'"):
        main.torch_version_str_compare_lessequal("1.8", "1.8.0")


def test_names_that_main_hands_on_are_those_of_their_homes() -> None:
    from cn_clip.clip import convert_state_dict, load
    from cn_clip.clip.model import convert_models_to_fp32, convert_weights

    assert (main.train, main.evaluate, main.get_data) == (train.train, train.evaluate, data.get_data)
    assert (main.convert_models_to_fp32, main.convert_weights) == (convert_models_to_fp32, convert_weights)
    assert (main.CLIP, main.load, main.convert_state_dict) == (CLIP, load, convert_state_dict)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = main.nothing


# --- loss, epoch, validation


def test_the_loss_of_a_batch_is_that_of_the_reference(model: CLIP, faces: Any) -> None:
    pixels, tokens = map(torch.from_numpy, next(iter(training_batches())))
    entropy = nn.CrossEntropyLoss()
    loss, shares = train.get_loss(model, pixels, tokens, entropy, entropy, arguments(aggregate=False))
    assert loss.item() == pytest.approx(faces["loss"].item(), rel=1e-5)  # float32 sums in another order
    assert shares is not None
    assert [shares["i2t"].item(), shares["t2i"].item()] == pytest.approx(faces["shares"].tolist())
    teacher = nn.Module()
    teacher.module = nn.Module()
    teacher.module.get_feature = lambda images: (images.flatten(1)[:, :48],)  # type: ignore[assignment]
    args = arguments(distillation=True, kd_loss_weight=0.5, report_training_batch_acc=False)
    taught, nothing = train.get_loss(model, pixels, tokens, entropy, entropy, args, teacher_model=teacher)
    assert taught.item() == pytest.approx(faces["taught_loss"].item(), rel=1e-5)
    assert nothing is None


def test_the_loss_of_a_chunk_is_that_of_all(model: CLIP) -> None:
    pixels, tokens = map(torch.from_numpy, next(iter(training_batches())))
    entropy = nn.CrossEntropyLoss()
    whole, _ = train.get_loss(model, pixels, tokens, entropy, entropy, arguments())
    with torch.no_grad():
        halves = [model(pixels[part], tokens[part]) for part in (slice(4), slice(4, 8))]
    features = [[half[place] for half in halves] for place in (0, 1)]
    args = arguments(accum_freq=2)
    for number, part in enumerate((slice(4), slice(4, 8))):
        loss, _ = train.get_loss(model, pixels[part], tokens[part], entropy, entropy, args, *features, number)
        assert loss.item() == pytest.approx(whole.item(), rel=1e-5)
    with pytest.raises(AssertionError, match="accum_freq is above 1"):
        train.get_loss(model, pixels, tokens, entropy, entropy, args)


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_epoch_gives_the_weights_and_rates_of_the_reference(
    wrapped: bool, model: CLIP, caplog: pytest.LogCaptureFixture
) -> None:
    golden = np.load(GOLDEN / "training.npz")
    optimizer = optimizer_of(model)
    schedule, rates = scheduler.cosine_lr(optimizer, 1e-3, 2, 5), []
    given: nn.Module = nn.ModuleDict({"module": model}) if wrapped else model
    if wrapped:  # as DistributedDataParallel does
        given.forward = model.forward  # type: ignore[method-assign]
    epoch = {"train": SimpleNamespace(dataloader=batches(), sampler=None)}
    with caplog.at_level(logging.INFO, "cn_clip"):
        done = train.train(given, epoch, 0, optimizer, None, lambda step: rates.append(schedule(step)), arguments(), 0)
    assert done == 5
    losses = [float(line.split("Loss: ")[1].split(" ")[0]) for line in caplog.messages if "Loss: " in line]
    np.testing.assert_allclose(losses, golden["losses"], atol=2e-5)
    np.testing.assert_allclose(rates, golden["rates"], rtol=1e-12)
    for name in golden.files[2:]:
        # Adam divides by the root of tiny squares: a rounding difference of a gradient near 0 moves a weight visibly.
        np.testing.assert_allclose(model.state_dict()[name].numpy(), golden[name], atol=2e-4)
    assert "Global Steps: 5/5 | Train Epoch: 1 [40/40 (100%)] | Loss: " in caplog.text
    assert "Global Batch Size: 8" in caplog.text


def test_an_epoch_stops_at_max_steps_counts_updates_of_joined_batches_and_sets_the_epoch(model: CLIP) -> None:
    epochs: list[int] = []
    sampler = SimpleNamespace(set_epoch=epochs.append)
    epoch = {"train": SimpleNamespace(dataloader=batches(), sampler=sampler)}
    asked: list[int] = []
    run = (epoch, 1, optimizer_of(model), None, asked.append)
    assert train.train(model, *run, arguments(accum_freq=2, max_steps=100), 7) == 2  # 5 batches are 2 updates
    assert (epochs, asked) == ([1], [2, 3])
    assert train.train(model, *run, arguments(max_steps=7), 7) == 2
    assert asked[2:] == [5, 6]


def test_joined_batches_give_the_update_of_the_large_batch(model: CLIP) -> None:
    other = copy.deepcopy(model)
    small, large = batches()[:4], Batches(tuple(map(torch.cat, zip(*batches()[:4], strict=True))) for _ in range(1))
    loaders = [Batches(small), Batches([tuple(large[0])])]
    loaders[0].num_batches, loaders[0].num_samples, loaders[1].num_batches, loaders[1].num_samples = 4, 32, 1, 32  # type: ignore[misc]
    for one, loader, number in ((model, loaders[0], 4), (other, loaders[1], 1)):
        epoch = {"train": SimpleNamespace(dataloader=loader, sampler=None)}
        for module in one.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        train.train(one, epoch, 0, optimizer, None, lambda step: None, arguments(accum_freq=number), 0)
    for name, value in model.state_dict().items():
        assert torch.allclose(value, other.state_dict()[name], atol=1e-5), name


def test_a_static_graph_of_ddp_takes_joined_batches_and_checkpointing(model: CLIP, tmp_path: Path) -> None:
    model.set_grad_checkpointing()
    other = copy.deepcopy(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        parallel._set_static_graph()
        for one in (parallel, other):
            epoch = {"train": SimpleNamespace(dataloader=batches(), sampler=None)}
            optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
            assert train.train(one, epoch, 0, optimizer, None, lambda step: None, arguments(accum_freq=2), 0) == 2
    finally:
        torch.distributed.destroy_process_group()
    for name, value in model.state_dict().items():
        assert torch.allclose(value, other.state_dict()[name], atol=1e-6), name


def test_a_validation_logs_means_over_its_batches(model: CLIP, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "cn_clip"):
        train.evaluate(model.train(), {"val": SimpleNamespace(dataloader=batches())}, 1, arguments(), 9)
    assert not model.training
    losses, right = [], 0
    with torch.no_grad():
        for pixels, tokens, _ in batches():
            images, texts, scale = model(pixels, tokens)
            logits, own = scale * images @ texts.t(), torch.arange(8)
            losses.append((nn.functional.cross_entropy(logits, own) + nn.functional.cross_entropy(logits.t(), own)) / 2)
            right += int((logits.argmax(1) == own).sum())
    mean = torch.stack(losses).mean().item()
    line = caplog.messages[-1]
    assert line.startswith(f"Validation Result (epoch 2 @ 9 steps) | Valid Loss: {mean:.6f}"[:-2])
    assert f"Image2Text Acc: {right / 40 * 100:.2f} | " in line
    assert line.endswith(f"logit_scale: {model.logit_scale.item():.3f} | Valid Batch Size: 8")


def test_an_epoch_validates_and_saves_when_it_is_due(
    model: CLIP, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    both = {name: SimpleNamespace(dataloader=batches(), sampler=None) for name in ("train", "val")}
    args = arguments(val_data="x", valid_step_interval=3, should_save=True, save_step_frequency=4)
    args.checkpoint_path = str(tmp_path)
    optimizer = optimizer_of(model)
    with caplog.at_level(logging.INFO, "cn_clip"):
        train.train(model, both, 0, optimizer, None, lambda step: None, args, 0)
    assert [line[:40] for line in caplog.messages if line.startswith("Validation Result")] == [
        "Validation Result (epoch 1 @ 3 steps) | "
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch_1_4.pt", "epoch_latest.pt"]
    saved = torch.load(tmp_path / "epoch_latest.pt", weights_only=True)
    assert (saved["epoch"], saved["step"], saved["name"]) == (1, 4, "mine")
    assert list(saved["state_dict"]) == list(model.state_dict())
    optimizer.load_state_dict(saved["optimizer"])


def test_processes_that_the_environment_does_not_know_are_refused(model: CLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    epoch = {"train": SimpleNamespace(dataloader=batches(), sampler=None)}
    with pytest.raises(ConfigError, match="has 2 processes, WORLD_SIZE says 1"):
        train.train(model, epoch, 0, optimizer_of(model), None, lambda step: None, arguments(), 0)


def test_norms_of_a_resnet_stay_frozen_and_those_of_other_towers_do_not() -> None:
    visual = nn.Sequential(nn.BatchNorm2d(2), nn.ReLU())
    holder = nn.Module()
    holder.visual = visual
    train.freeze_vision_bn(SimpleNamespace(vision_model="ViT-B-16"), holder.train())
    assert visual[0].training
    train.freeze_vision_bn(SimpleNamespace(vision_model="RN50"), holder.train())
    assert not visual[0].training
    assert visual[1].training


def test_the_distance_of_a_teacher_is_one_minus_the_mean_cosine() -> None:
    teacher, student = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    assert train.cosineSimilarityLoss(teacher, student).item() == pytest.approx(0.5)  # cosines 1 and 0


# --- the log


def test_the_log_goes_through_the_queue_to_the_screen_and_the_file(tmp_path: Path) -> None:
    program = """
import logging, sys
from cn_clip.training.logger import setup_primary_logging, setup_worker_logging
for rank in (0, 1):
    queue = setup_primary_logging(sys.argv[1] + str(rank), logging.INFO, rank)
    setup_worker_logging(rank, queue, logging.INFO)
    logging.info("step %d", 3)
    logging.getLogger("cn_clip").info("ours")
    logging.debug("hidden")
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "log")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split(" | ", 1)[1] for line in done.stderr.splitlines()]
    assert sorted(lines) == sorted(f"INFO | Rank {rank} | {text}" for rank in (0, 1) for text in ("step 3", "ours"))
    assert [path.name for path in tmp_path.iterdir()] == ["log0"]
    assert (tmp_path / "log0").read_text().count("Rank 0 | ") == 2


def test_a_corrupt_picture_is_named(tmp_path: Path) -> None:
    dataset = data.LMDBDataset(str(emoji_split(tmp_path, corrupt=1)), resolution=8)
    with pytest.raises(DataError, match="image id 2"):
        dataset[1]
