"""The losses against values worked by hand and against the plain formulas on the whole matrix."""

import math
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cn_clip.training.loss import Objective, Pairs, contrastive_scores, feature_distillation_loss, sigmoid_scores


def random_pairs(num_pairs: int, *, seed: int = 0, width: int = 6) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2, num_pairs, width, generator=generator, dtype=torch.float64)
    image, text = F.normalize(rows, dim=-1).requires_grad_().unbind(0)
    return Pairs(image.detach().requires_grad_(), text.detach().requires_grad_(), torch.tensor(5.0, requires_grad=True))


def plain_loss(pairs: Pairs) -> Tensor:
    logits = pairs.scale * pairs.image_ND @ pairs.text_ND.t()
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2


def gradients(loss: Tensor, pairs: Pairs) -> tuple[Tensor, ...]:
    inputs = [tensor for tensor in pairs[:4] if tensor is not None]
    return torch.autograd.grad(loss, inputs)


def pairs_with_logits(logits: list[list[float]]) -> Pairs:
    """Features whose products are these logits."""
    matrix = torch.tensor(logits)
    return Pairs(matrix, torch.eye(len(matrix)), torch.tensor(1.0))


def test_loss_of_two_pairs_is_the_value_worked_by_hand() -> None:
    scores = contrastive_scores(pairs_with_logits([[2.0, 0.0], [1.0, 3.0]]))
    rows = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-2))) / 2
    columns = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-3))) / 2
    assert scores.loss.item() == pytest.approx((rows + columns) / 2)
    assert (scores.images_right.item(), scores.texts_right.item()) == (2.0, 2.0)
    in_blocks = contrastive_scores(pairs_with_logits([[2.0, 0.0], [1.0, 3.0]]), block_rows=1)
    assert in_blocks.loss.item() == pytest.approx(0.154, abs=5e-4)  # as worked out in its docstring
    wrong = contrastive_scores(pairs_with_logits([[0.0, 5.0], [1.0, 3.0]]))
    assert (wrong.images_right.item(), wrong.texts_right.item()) == (1.0, 0.0)


@pytest.mark.parametrize("block_rows", [3, 8])
def test_loss_of_equal_features_is_ln_of_the_batch_and_one_guess_in_the_batch_is_right(block_rows: int) -> None:
    unit = F.normalize(torch.ones(8, 4), dim=-1)
    scores = contrastive_scores(Pairs(unit, unit, torch.tensor(10.0)), block_rows)
    assert scores.loss.item() == pytest.approx(math.log(8))
    assert (scores.images_right.item(), scores.texts_right.item()) == (1.0, 1.0)


@settings(max_examples=40, deadline=None)
@given(num_pairs=st.integers(1, 12), block_rows=st.integers(1, 12), seed=st.integers(0, 9))
def test_blocks_of_any_size_give_loss_gradients_and_accuracy_of_the_whole_matrix(
    num_pairs: int, block_rows: int, seed: int
) -> None:
    pairs = random_pairs(num_pairs, seed=seed)
    scores = contrastive_scores(pairs, block_rows)
    expected = plain_loss(pairs)
    assert scores.loss.item() == pytest.approx(expected.item(), abs=1e-6)
    for ours, theirs in zip(gradients(scores.loss, pairs), gradients(expected, pairs), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    logits = pairs.image_ND @ pairs.text_ND.t()
    target = torch.arange(num_pairs)
    right = [(logits.argmax(dim=dim) == target).sum().item() for dim in (1, 0)]
    assert [scores.images_right.item(), scores.texts_right.item()] == right


def test_a_large_batch_never_holds_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    logits = torch.Tensor.__matmul__

    def noted(self: Tensor, other: Tensor) -> Tensor:
        product = logits(self, other)
        sizes.append(product.numel())
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", noted)
    pairs = random_pairs(64)
    torch.autograd.backward(contrastive_scores(pairs, block_rows=8).loss)
    assert max(sizes) == 8 * 64
    assert len(sizes) == 16  # eight blocks, each once forward and once again in the backward pass


@pytest.mark.parametrize("block_rows", [1, 2, 4])
def test_pairs_that_share_a_picture_or_a_text_are_not_each_others_negatives(block_rows: int) -> None:
    # Pictures 0 and 1 are the same, texts 1 and 2 are the same; pair 3 is alone.
    logits = [[3.0, 9.0, 1.0, 0.0], [9.0, 2.0, 9.0, 1.0], [0.0, 9.0, 2.0, 1.0], [1.0, 0.0, 2.0, 4.0]]
    pairs = pairs_with_logits(logits)._replace(
        image_keys_N=torch.tensor([7, 7, 8, 9]), text_keys_N=torch.tensor([1, 2, 2, 3])
    )
    left = {0: (0, 2, 3), 1: (1, 3), 2: (0, 2, 3), 3: (0, 1, 2, 3)}

    def term(values: list[float], own: float) -> float:
        return math.log(sum(math.exp(value) for value in values)) - own

    rows = [term([logits[i][j] for j in left[i]], logits[i][i]) for i in left]
    columns = [term([logits[i][j] for i in left if j in left[i]], logits[j][j]) for j in left]
    scores = contrastive_scores(pairs, block_rows)
    assert scores.loss.item() == pytest.approx((sum(rows) + sum(columns)) / 8, rel=1e-6)
    assert (scores.images_right.item(), scores.texts_right.item()) == (4.0, 4.0)


def test_a_batch_of_one_picture_alone_has_no_negatives_and_finite_gradients() -> None:
    same = torch.zeros(4, dtype=torch.int64)
    pairs = random_pairs(4)._replace(image_keys_N=same, text_keys_N=torch.arange(4))
    scores = contrastive_scores(pairs, block_rows=2)
    assert scores.loss.item() == pytest.approx(0.0, abs=1e-6)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(scores.loss, pairs))


@pytest.mark.parametrize("block_rows", [1, 2])
def test_sigmoid_loss_of_two_pairs_is_the_value_worked_by_hand(block_rows: int) -> None:
    pairs = pairs_with_logits([[2.0, 0.0], [1.0, 3.0]])._replace(bias=torch.tensor(-1.0))

    def cost(logit: float) -> float:
        return math.log(1 + math.exp(-logit))

    expected = (cost(2 - 1) + cost(-(0 - 1)) + cost(-(1 - 1)) + cost(3 - 1)) / 2
    assert sigmoid_scores(pairs, block_rows).loss.item() == pytest.approx(expected)


def test_sigmoid_loss_asks_nothing_between_pairs_of_one_text() -> None:
    pairs = pairs_with_logits([[2.0, 50.0], [50.0, 3.0]])._replace(
        image_keys_N=torch.tensor([1, 2]), text_keys_N=torch.tensor([5, 5])
    )
    expected = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-3))) / 2
    assert sigmoid_scores(pairs).loss.item() == pytest.approx(expected)


def test_the_distance_from_the_teacher_is_added_with_its_weight() -> None:
    pairs = random_pairs(3)
    teacher = torch.eye(6, dtype=torch.float64)[:3]
    student = Objective("clip", 0.25)
    distance = 1 - F.cosine_similarity(teacher, pairs.image_ND).mean()
    expected = plain_loss(pairs) + 0.25 * distance
    assert student(pairs._replace(teacher_NT=teacher)).loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert student(pairs).loss.item() == pytest.approx(plain_loss(pairs).item(), rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["clip", "siglip"]),
    num_processes=st.integers(1, 4),
    num_own=st.integers(1, 3),
    block_rows=st.integers(1, 4),
    keys=st.lists(st.integers(0, 3), min_size=24, max_size=24),
)
def test_the_mean_of_the_losses_of_each_process_is_the_loss_of_all_and_so_are_its_gradients(
    kind: Literal["clip", "siglip"], num_processes: int, num_own: int, block_rows: int, keys: list[int]
) -> None:
    total = num_processes * num_own
    pairs = random_pairs(total)._replace(
        bias=torch.tensor(-0.5, requires_grad=True),
        image_keys_N=torch.tensor(keys[:total]),
        text_keys_N=torch.tensor(keys[12 : 12 + total]),
        teacher_NT=torch.eye(12, 6, dtype=torch.float64)[:total] + 0.1,
    )
    assert pairs.teacher_NT is not None
    objective = Objective(kind, 0.3)
    whole = objective(pairs)
    parts = []
    for process in range(num_processes):
        own = slice(process * num_own, (process + 1) * num_own)
        parts.append(objective(pairs._replace(own_rows=own, teacher_NT=pairs.teacher_NT[own]), block_rows))
    mean = torch.stack([part.loss for part in parts]).mean()
    torch.testing.assert_close(mean, whole.loss, atol=1e-6, rtol=1e-5)
    inputs = [pairs.image_ND, pairs.text_ND, pairs.scale]
    for ours, theirs in zip(torch.autograd.grad(mean, inputs), torch.autograd.grad(whole.loss, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert sum(part.images_right for part in parts) == whole.images_right
    assert sum(part.texts_right for part in parts) == whole.texts_right


def test_the_local_loss_of_two_processes_is_the_value_worked_by_hand() -> None:
    pairs = pairs_with_logits([[2.0, 0.0], [1.0, 3.0]])
    parts = [contrastive_scores(pairs._replace(own_rows=slice(n, n + 1))).loss.item() for n in range(2)]
    # as worked out in its docstring
    assert parts == [pytest.approx((0.127 + 0.313) / 2, abs=5e-4), pytest.approx((0.127 + 0.049) / 2, abs=5e-4)]


def test_matryoshka_is_the_mean_of_the_losses_of_beginnings() -> None:
    rows = torch.tensor([[0.6, 0.8], [0.8, -0.6]])
    pairs = Pairs(rows, rows.clone(), torch.tensor(1.0))
    # Whole: logits [[1, 0], [0, 1]], ln(e + 1) - 1 = 0.3133. The first number alone is 1 everywhere: ln 2 = 0.6931.
    whole, cut = Objective("clip")(pairs), Objective("clip", dimensions=(1,))(pairs)
    assert whole.loss.item() == pytest.approx(0.3133, abs=1e-4)
    assert cut.loss.item() == pytest.approx((0.3133 + 0.6931) / 2, abs=1e-4)
    assert cut[1:] == whole[1:], "what is right is that of whole vectors"


def test_what_a_teacher_weighs_does_not_depend_on_matryoshka() -> None:
    pairs = random_pairs(6)
    teacher = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    for objective in (Objective("clip", 0.5), Objective("clip", 0.5, (3,))):
        with_it = objective(pairs._replace(teacher_NT=teacher)).loss - objective(pairs).loss
        expected = 0.5 * feature_distillation_loss(teacher, pairs.image_ND)
        torch.testing.assert_close(with_it, expected, atol=1e-6, rtol=1e-5)


class _Operators(TorchDispatchMode):
    """Notes what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        # A number for chosen elements, and elements chosen by truth values, whose count the device must say first.
        assert not (func.overloadpacket.__name__ == "index" and any(one.dtype is torch.bool for one in args[1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("block_rows", [2, 8])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_loss_asks_nothing_for_which_a_gpu_would_have_to_be_waited_for(
    kind: Literal["clip", "siglip"], block_rows: int
) -> None:
    keys = torch.tensor([1, 1, 2, 3, 4, 5, 6, 7])
    pairs = random_pairs(8)._replace(image_keys_N=keys, text_keys_N=keys.flip(0), teacher_NT=torch.ones(8, 3))
    with _Operators() as seen:
        torch.autograd.backward(Objective(kind, 0.5)(pairs, block_rows).loss)
    assert "mm" in seen.names  # the logits
    assert not seen.names & {"index_put", "index_put_", "nonzero", "_local_scalar_dense", "masked_select", "lift_fresh"}
