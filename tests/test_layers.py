"""What the layers compute on CUDA by other kernels equals what they compute elsewhere; here by value on the CPU."""

# B batch, L tokens, Q queries, D width, H heads

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import TOKENS, tiny_model, tiny_pixels
from torch import Tensor, nn

from cn_clip.clip import layers
from cn_clip.clip.backends.pytorch import TorchBackend
from cn_clip.clip.bert import BertModel
from cn_clip.clip.layers import LayerNorm, QuickGELU
from cn_clip.clip.model import CLIP
from cn_clip.clip.visual import ModifiedResNet, VisualTransformer
from cn_clip.training.distributed import whole
from cn_clip.training.scheduler import build_optimizer, decay_groups, load_optimizer_state, optimizer_state

# One rounding of the result, and one of an operand before it.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def drawn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Normal numbers, of which gradients are wanted."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def kept(compute: Callable[[], Tensor]) -> list[tuple[torch.dtype, int]]:
    """Type and size of each storage that the backward pass of `compute` keeps."""
    found: dict[int, Tensor] = {}

    def keep(one: Tensor) -> Tensor:
        found[one.untyped_storage()._cdata] = one
        return one

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
        output = compute()
    del output
    return sorted(((one.dtype, one.numel()) for one in found.values()), key=str)


# --- normalisation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("weights", [torch.float32, None])
def test_a_norm_in_the_type_of_its_input_is_that_in_float32(dtype: torch.dtype, weights: torch.dtype | None) -> None:
    norm = LayerNorm(32).to(weights or dtype)
    nn.init.normal_(norm.weight, 1, 0.3)
    nn.init.normal_(norm.bias)
    x, upstream = drawn(5, 7, 32, dtype=dtype), drawn(5, 7, 32, dtype=dtype, seed=1).detach()
    expected = norm(x)
    expected_gradient = torch.autograd.grad(expected, [x, norm.weight, norm.bias], upstream)
    with torch.autocast("cpu", torch.bfloat16):
        output = layers.normalised_in_type(x, norm.weight, norm.bias, norm.eps)
    assert output.dtype == dtype
    allowed = ROUNDING[dtype]
    torch.testing.assert_close(output, expected, rtol=2 * allowed, atol=2 * allowed)
    gradients = torch.autograd.grad(output, [x, norm.weight, norm.bias], upstream)
    for gradient, one in zip(gradients, expected_gradient, strict=True):
        assert gradient.dtype == one.dtype
        torch.testing.assert_close(gradient, one, rtol=8 * allowed, atol=8 * allowed)


def test_a_norm_has_exact_derivatives() -> None:
    x, weight, bias = drawn(3, 8), drawn(8, seed=1), drawn(8, seed=2)
    function = lambda *tensors: layers.normalised_in_type(*tensors, 1e-5)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, weight, bias))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias))


def test_a_norm_keeps_its_input_in_its_type_also_under_autocast() -> None:
    norm, x = LayerNorm(32), drawn(64, 32, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        before = kept(lambda: norm(x))
        lean = kept(lambda: layers.normalised_in_type(x, norm.weight, norm.bias, norm.eps))
    assert (torch.float32, 64 * 32) in before
    assert [one for one in lean if one[1] == 64 * 32] == [(torch.bfloat16, 64 * 32)]


# --- the quick GELU ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ROUNDING)
def test_the_quick_gelu_by_silu_is_the_plain_one(dtype: torch.dtype) -> None:
    x = torch.linspace(-12, 12, 1001, dtype=dtype, requires_grad=True)
    plain, lean = QuickGELU()(x), layers.quick_gelu_by_silu(x)
    assert lean.dtype == dtype
    torch.testing.assert_close(lean, plain, rtol=4 * ROUNDING[dtype], atol=4 * ROUNDING[dtype])
    gradients = [torch.autograd.grad(output.sum(), x)[0] for output in (plain, lean)]
    torch.testing.assert_close(*gradients, rtol=4 * ROUNDING[dtype], atol=4 * ROUNDING[dtype])


def test_the_quick_gelu_by_silu_has_exact_derivatives_and_keeps_one_tensor() -> None:
    x = drawn(4, 9)
    torch.testing.assert_close(layers.quick_gelu_by_silu(x), QuickGELU()(x), rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(layers.quick_gelu_by_silu, (x,))
    assert torch.autograd.gradgradcheck(layers.quick_gelu_by_silu, (x,))
    assert len(kept(lambda: QuickGELU()(x))) == 2
    assert len(kept(lambda: layers.quick_gelu_by_silu(x))) == 1


def perceptron(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    block = tiny_vit().transformer.resblocks[0]
    return copy.deepcopy(block.mlp).to(dtype)


def tiny_vit() -> VisualTransformer:
    visual = tiny_model().visual
    assert isinstance(visual, VisualTransformer)
    return visual


def test_a_perceptron_with_scaled_weights_is_the_plain_one() -> None:
    mlp, x = perceptron(), drawn(6, 64)
    plain, lean = mlp(x), layers.quick_gelu_perceptron(x, mlp.c_fc, mlp.c_proj)
    torch.testing.assert_close(lean, plain, rtol=1e-12, atol=1e-12)
    wanted = [x, *mlp.parameters()]
    gradients = [torch.autograd.grad(output.square().sum(), wanted) for output in (plain, lean)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_a_perceptron_with_scaled_weights_stays_close_in_mixed_precision() -> None:
    mlp, x = perceptron(torch.float32), drawn(50, 64, dtype=torch.float32)
    exact = mlp(x)
    with torch.autocast("cpu", torch.bfloat16):
        plain, lean = mlp(x), layers.quick_gelu_perceptron(x, mlp.c_fc, mlp.c_proj)
    assert lean.dtype == torch.bfloat16
    errors = [((output.float() - exact).norm() / exact.norm()).item() for output in (plain, lean)]
    assert errors[1] < max(1.3 * errors[0], 2**-8)


def test_a_block_scales_weights_only_for_many_rows_of_its_own_layers() -> None:
    block = tiny_vit().transformer.resblocks[0]
    assert block._plain_perceptron(rows=128) == (block.mlp.c_fc, block.mlp.c_proj)
    assert block._plain_perceptron(rows=127) is None
    block.mlp.c_fc = nn.Sequential(block.mlp.c_fc)
    assert block._plain_perceptron(rows=128) is None
    block.mlp = nn.Identity()
    assert block._plain_perceptron(rows=128) is None


def test_another_activation_for_all_blocks_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    block = tiny_vit().transformer.resblocks[0]
    monkeypatch.setattr(QuickGELU, "forward", lambda _, x: x)
    assert block._plain_perceptron(rows=128) is None


# --- attention of texts -----------------------------------------------------------------------------------------------


@given(st.integers(1, 3), st.integers(1, 40), st.sampled_from(list(ROUNDING)))
def test_a_mask_gets_aligned_rows_and_keeps_its_values(batch: int, length: int, dtype: torch.dtype) -> None:
    mask = torch.arange(batch * length).view(batch, 1, 1, length).to(dtype)
    padded = layers.aligned(mask)
    assert torch.equal(padded, mask)
    assert batch == 1 or padded.stride(0) % 8 == 0
    assert layers.aligned(padded) is padded


@pytest.mark.parametrize("queries", [5, 1])
def test_the_efficient_kernel_gets_what_attention_is_defined_by(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *rest: Any) -> tuple[Tensor]:
        asked.append((tuple(mask.shape), *(stride % 8 for stride in mask.stride()[:-1]), *rest))
        return (F.scaled_dot_product_attention(query, key, value, mask),)

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_efficient_attention", kernel)
    query, key, value = drawn(3, 2, queries, 8), drawn(3, 2, 5, 8, seed=1), drawn(3, 2, 5, 8, seed=2)
    bias = torch.where(TOKENS.ne(0), 0.0, -10000.0).double()[:, None, None]
    expected = F.scaled_dot_product_attention(query, key, value, bias)
    assert torch.equal(layers.efficient_attention(query, key, value, bias, 0.25), expected)
    with torch.no_grad():
        layers.efficient_attention(query, key, value, bias)
    shape = (3, 2, queries, 5)
    assert asked == [(shape, 0, 0, 0, True, 0.25), (shape, 0, 0, 0, False, 0.0)]


@pytest.mark.parametrize("masked", [False, True])
def test_pytorch_has_the_efficient_kernel_under_its_name(masked: bool) -> None:
    query, key, mask = (torch.empty(3, 2, length, 8, device="meta") for length in (4, 5, 1))
    bias = mask.new_empty(3, 1, 1, 5) if masked else None
    assert layers.efficient_attention(query, key, key, bias, 0.1).shape == (3, 2, 4, 8)


def test_rows_between_text_layers_have_the_type_of_mixed_precision() -> None:
    x = torch.tensor([1 + 2**-12])
    assert layers.in_mixed_type(x) is x
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layers.in_mixed_type(x), torch.ones(1, dtype=torch.bfloat16))


def test_rows_without_padding_give_the_same_without_a_mask() -> None:
    model, full = tiny_model(), TOKENS[:1].repeat(2, 1)
    with torch.inference_mode():
        assert torch.equal(model.encode_text(full, padded=False), model.encode_text(full))
        assert not torch.allclose(model.encode_text(TOKENS, padded=False)[1], model.encode_text(TOKENS)[1])


def test_the_backend_asks_for_a_mask_only_for_rows_with_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[bool] = []
    forward = BertModel.forward

    def spied(self: BertModel, ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        masks.append(attention_mask is not None)
        return forward(self, ids, attention_mask, **options)

    backend = TorchBackend(tiny_model())
    monkeypatch.setattr(BertModel, "forward", spied)
    for rows in (TOKENS, TOKENS[:1], TOKENS[1:2, :3]):
        backend.encode_tokens(rows.numpy())
    assert masks == [True, False, False]


# --- layout of a ResNet's weights -------------------------------------------------------------------------------------


def stepped(model: CLIP, saved: dict[str, Any] | None = None) -> tuple[CLIP, torch.optim.AdamW, dict[str, Any]]:
    """The model one step of training further, with moments from `saved`, its optimizer, and the moments of a file."""
    optimizer = build_optimizer(model.train(), lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
    if saved is not None:
        load_optimizer_state(optimizer, decay_groups(model), copy.deepcopy(saved))
    model.encode_image(tiny_pixels(model)).square().sum().backward()
    optimizer.step()
    return model, optimizer, optimizer_state(optimizer, decay_groups(model))


def test_a_resnet_in_channels_last_trains_and_goes_on_as_one_that_is_not() -> None:
    plain, other = tiny_model("resnet"), tiny_model("resnet")
    assert isinstance(other.visual, ModifiedResNet)
    other.visual.use_channels_last()
    plain, _, plain_state = stepped(plain)
    other, optimizer, state = stepped(other)
    weight = other.visual.layer1[0].conv2.weight
    moment = optimizer.state[weight]["exp_avg"]
    assert not weight.is_contiguous()
    assert weight.stride() == moment.stride() == weight.grad.stride()
    tensors = {name: whole(value) for name, value in other.state_dict().items()}
    tensors |= {f"{number} {name}": one for number, of in state["state"].items() for name, one in of.items()}
    assert all(one.is_contiguous() for one in tensors.values())
    for number, entry in plain_state["state"].items():
        torch.testing.assert_close(state["state"][number], entry, rtol=1e-4, atol=1e-6)
    fresh = []
    for channels_last in (False, True):
        model = tiny_model("resnet", seed=1)
        if channels_last:
            model.visual.use_channels_last()
        model.load_state_dict(other.state_dict())
        model, optimizer, _ = stepped(model, state)
        fresh.append(model.state_dict())
        for parameter, entry in optimizer.state.items():
            assert entry["exp_avg"].stride() == parameter.stride()
    for name, value in fresh[0].items():
        torch.testing.assert_close(fresh[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


# --- gradient checkpointing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dropout", "states"), [(0.0, 0), (0.1, 2)])
def test_checkpointing_keeps_random_states_only_where_something_is_drawn(
    dropout: float, states: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked = tiny_model().train(), []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    model.set_grad_checkpointing()
    before = torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: asked.append(1) or before())
    model.encode_image(tiny_pixels(model))
    assert not asked
    model.encode_text(TOKENS)
    assert len(asked) == states
    model.bert.eval()
    model.bert.encoder.train(True)
    for layer in model.bert.encoder.layer:
        layer.eval()
    model.encode_text(TOKENS)
    assert len(asked) == states


def test_code_of_a_program_may_draw() -> None:
    block = tiny_vit().transformer.resblocks[0]
    assert not layers.may_draw(block)
    hook = block.ln_1.register_forward_hook(lambda *_: None)
    assert layers.may_draw(block)
    hook.remove()
    block.attn = nn.MultiheadAttention(64, 1, dropout=0.5)
    assert layers.may_draw(block)
