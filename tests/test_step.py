"""One update: batches joined by accumulation give the gradients of the large batch."""

import contextlib
from typing import Any, Literal

import pytest
import torch
from deterministic import SMALL_MODEL, training_batches
from torch import Tensor

from cn_clip.clip.model import CLIP
from cn_clip.clip.transfers import on_device
from cn_clip.clip.transforms import normalised
from cn_clip.data.datasets import PairBatch
from cn_clip.training.distributed import Parallel
from cn_clip.training.loss import Objective, Pairs, contrastive_scores
from cn_clip.training.state import rng_state
from cn_clip.training.step import Batch, Learner, Teacher, make_batch

CPU = torch.device("cpu")


def model_with(device: torch.device = CPU, **changes: Any) -> CLIP:
    torch.manual_seed(3)
    return CLIP(**{**SMALL_MODEL, **changes}).train().to(device)


def batches(number: int, device: torch.device) -> list[Batch]:
    """The same 8 pairs in `number` batches, texts of different lengths."""
    ((pixels, tokens),) = training_batches(1)
    parts = zip(torch.from_numpy(pixels).chunk(number), torch.from_numpy(tokens).chunk(number), strict=True)
    ids = iter(range(8))
    made = []
    for pixels_B3RR, tokens_BL in parts:
        numbers = [next(ids) for _ in range(len(tokens_BL))]
        pairs = PairBatch(pixels_B3RR, tokens_BL, [n // 2 for n in numbers], numbers, [0] * 8)
        made.append(make_batch(pairs, device))
    return made


def learner(model: CLIP, kind: Literal["clip", "siglip"] = "clip", **settings: Any) -> Learner:
    device = model.logit_scale.device
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    autocast = settings.pop("autocast", contextlib.nullcontext)
    objective = Objective(kind, 0.5 if "teacher" in settings else 0.0, settings.pop("dimensions", ()))
    return Learner(Parallel(model, device), objective, scaler, autocast, **settings)


def gradients(model: CLIP) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=2e-6, rtol=2e-4, msg=f"{name}: another gradient")


TEACHER = Teacher(lambda pixels: pixels[:, :, :4, :4].flatten(1), resolution=None)


@pytest.mark.parametrize("number", [2, 4, 8])
@pytest.mark.parametrize(
    "settings",
    [{}, {"multi_positive": True}, {"teacher": TEACHER}, {"kind": "siglip"}, {"dimensions": (3, 8)}],
    ids=lambda s: str(list(s)),
)
def test_accumulated_batches_give_loss_and_gradients_of_the_large_batch(
    number: int, settings: dict[str, Any], device: torch.device
) -> None:
    results = []
    for parts in (1, number):
        model = model_with(device)
        if settings.get("kind") == "siglip":
            model.add_logit_bias()
        scores = learner(model, **settings).backward(batches(parts, device))
        results.append((scores, gradients(model)))
    (whole, expected), (joined, found) = results
    assert joined.loss.item() == pytest.approx(whole.loss.item(), rel=1e-5)
    assert (joined.images_right, joined.texts_right) == (whole.images_right, whole.texts_right)
    assert len(expected) == len(list(model_with(device).parameters())) + (settings.get("kind") == "siglip")
    assert_close(found, expected)


def test_both_passes_draw_the_same_dropout_and_the_same_patches(device: torch.device) -> None:
    """The reference: every batch forward once with gradients, in turn, then one loss over all of them."""
    dropout = {"text_hidden_dropout_prob": 0.2, "text_attention_probs_dropout_prob": 0.1}
    model = model_with(device, **dropout)
    torch.manual_seed(11)
    outputs = [model(batch.pixels_B3RR, batch.tokens_BL, 0.5) for batch in batches(4, device)]
    image, text = (torch.cat([output[part] for output in outputs]) for part in (0, 1))
    torch.autograd.backward(contrastive_scores(Pairs(image, text, outputs[0][2])).loss)
    expected, after = gradients(model), rng_state(device)
    model = model_with(device, **dropout)
    torch.manual_seed(11)
    learner(model, mask_ratio=0.5).backward(batches(4, device))
    assert_close(gradients(model), expected)
    for kind, before in after.items():
        assert torch.equal(rng_state(device)[kind], before)


def test_a_frozen_tower_gets_no_gradients_and_the_other_those_of_the_large_batch(device: torch.device) -> None:
    results = []
    for number in (1, 4):
        model = model_with(device)
        model.visual.requires_grad_(False)
        learner(model).backward(batches(number, device))
        results.append(gradients(model))
    assert_close(results[1], results[0])
    assert not any(name.startswith("visual.") for name in results[0])


def test_running_statistics_move_once_for_each_batch(device: torch.device) -> None:
    resnet = {"vision_layers": (1, 1, 1, 1), "vision_width": 8, "vision_patch_size": None, "image_resolution": 32}
    model = model_with(device, **resnet)
    learner(model).backward(batches(4, device))
    tracked = [value for name, value in model.named_buffers() if name.endswith("num_batches_tracked")]
    assert tracked
    assert {int(value) for value in tracked} == {4}


def test_recomputing_activations_changes_no_gradient(device: torch.device) -> None:
    results = []
    for checkpointing in (False, True):
        model = model_with(text_hidden_dropout_prob=0.2)
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(5)
        learner(model).backward(batches(1, device))
        results.append(gradients(model))
    assert_close(results[1], results[0])


def test_mixed_precision_accumulates_what_the_large_batch_gives_within_its_rounding(device: torch.device) -> None:
    results = []
    for number in (1, 4):
        model = model_with(device)
        learner(model, autocast=lambda: torch.autocast(device.type, torch.bfloat16)).backward(batches(number, device))
        results.append(torch.cat([gradient.flatten() for gradient in gradients(model).values()]))
    assert torch.nn.functional.cosine_similarity(*results, dim=0) > 0.999


def test_keys_are_equal_where_picture_or_text_is() -> None:
    tokens = torch.tensor([[101, 7, 102, 0, 0], [101, 7, 102, 0, 0], [101, 8, 102, 0, 0], [101, 7, 8, 102, 0]])
    batch = make_batch(PairBatch(torch.zeros(4, 3, 2, 2), tokens, ["a", 1, "1", 1], [1, 2, 3, 4], [0] * 4), CPU)
    assert batch.keys_B2 is not None
    image_keys, text_keys = (keys.tolist() for keys in batch.keys_B2.unbind(1))
    assert image_keys[1] == image_keys[3]
    assert len(set(image_keys)) == 3
    assert text_keys[0] == text_keys[1]
    assert len(set(text_keys)) == 3
    assert batch.tokens_BL.shape == (4, 4)


def test_a_batch_comes_to_the_device_as_it_was_loaded_with_its_texts_cut(device: torch.device) -> None:
    pixels = torch.arange(2 * 3 * 2 * 2, dtype=torch.uint8).reshape(2, 3, 2, 2)
    tokens = torch.tensor([[101, 5, 102, 0, 0], [101, 102, 0, 0, 0]])
    batch = make_batch(PairBatch(pixels, tokens, [7, 8], ["a", "b"], [0, 0]), device)
    assert batch.keys_B2 is not None
    assert {tensor.device for tensor in (batch.pixels_B3RR, batch.tokens_BL, batch.keys_B2)} == {device}
    assert batch.pixels_B3RR.dtype == torch.uint8
    assert torch.equal(batch.pixels_B3RR.cpu(), pixels)
    assert batch.tokens_BL.tolist() == [[101, 5, 102], [101, 102, 0]]
    assert batch.ids == [(7, "a"), (8, "b")]


def test_copies_made_while_others_are_in_use_hold_their_own_values(device: torch.device) -> None:
    sums = []
    for number in range(20):  # each is freed while a GPU still reads it
        (copy,) = on_device([torch.full((1 << 20,), float(number))], device)
        sums.append((copy * 2).sum())
        del copy
    assert [total.item() / (1 << 21) for total in sums] == list(range(20))


def test_a_teacher_sees_bytes_as_the_pixels_they_mean_before_it_resizes_them() -> None:
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (2, 3, 6, 6), dtype=torch.uint8)
    for resolution in (None, 4):
        teacher = Teacher(lambda seen: seen.flatten(1), resolution=resolution)
        assert torch.equal(teacher.features(pixels), teacher.features(normalised(pixels)))
        assert teacher.features(pixels).min() < -1  # bytes as they are would be 0 or more
