"""The model: its shortcuts equal the full computation, and its limits are refused."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import CONFIGS, TOKENS, tiny_model, tiny_pixels

from cn_clip import zoo
from cn_clip.clip.layers import attend
from cn_clip.clip.model import CLIP, convert_models_to_fp32, convert_weights, resize_pos_embed
from cn_clip.clip.transforms import normalised
from cn_clip.clip.visual import ModifiedResNet, VisualTransformer, keep_random_patches
from cn_clip.errors import ConfigError

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def _same_random_numbers() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def vit(model: CLIP) -> VisualTransformer:
    assert isinstance(model.visual, VisualTransformer)
    return model.visual


# --- the class token alone equals the whole ---------------------------------------------------------------------------


def test_text_features_are_the_projected_first_hidden_state() -> None:
    model = tiny_model()
    with torch.inference_mode():
        hidden, _ = model.bert(TOKENS, attention_mask=TOKENS.ne(0))
        assert hidden.shape == (3, 5, 64)
        torch.testing.assert_close(model.encode_text(TOKENS), hidden[:, 0] @ model.text_projection)


def test_the_first_token_of_the_vit_alone_is_that_of_all_tokens() -> None:
    transformer = vit(tiny_model()).transformer
    x = torch.randn(17, 2, 64)
    with torch.inference_mode():
        whole = transformer(x)
        assert whole.shape == (17, 2, 64)
        torch.testing.assert_close(transformer(x, first_only=True), whole[:1])


def test_attention_here_is_that_of_pytorchs_own_module() -> None:
    ours = vit(tiny_model()).transformer.resblocks[0].attn
    theirs = torch.nn.MultiheadAttention(64, 1).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(9, 2, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x, x, x), theirs(x, x, x))


def test_attend_is_softmax_of_scaled_products() -> None:
    query, key, value = torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    head = slice(4, 8)
    scores = query[..., head] @ key[..., head].transpose(1, 2) / 4**0.5
    torch.testing.assert_close(attend(query, key, value, 2)[..., head], scores.softmax(dim=-1) @ value[..., head])


def test_padding_changes_nothing(device: torch.device) -> None:
    model, tokens = tiny_model().to(device), TOKENS.to(device)
    padded = torch.cat([tokens, tokens.new_zeros(3, 47)], dim=1)
    with torch.inference_mode():
        torch.testing.assert_close(model.encode_text(padded), model.encode_text(tokens), atol=1e-5, rtol=1e-5)


def test_a_row_of_nothing_but_padding_gives_numbers(device: torch.device) -> None:
    model = tiny_model().to(device)
    with torch.inference_mode():
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            nothing = torch.zeros(2, 4, dtype=torch.long, device=device)
            assert model.to(dtype).encode_text(nothing).isfinite().all()


# --- calls and shapes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_forward_pass_gives_unit_rows_and_the_scale(kind: str) -> None:
    model = tiny_model(kind)
    pixels = tiny_pixels(model)
    with torch.inference_mode():
        images, texts, scale = model(pixels, TOKENS)
        per_image, per_text = model.get_similarity(pixels, TOKENS[:2])
        assert torch.equal(model(pixels, None), model.encode_image(pixels))
        assert torch.equal(model(None, TOKENS), model.encode_text(TOKENS))
    torch.testing.assert_close(images.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(scale, model.logit_scale.exp())
    torch.testing.assert_close(per_image, scale * images @ texts[:2].t())
    assert torch.equal(per_text, per_image.t())


def test_a_pass_without_picture_and_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="text and image cannot both be None"):
        tiny_model()(None, None)


@pytest.mark.parametrize("shape", [(1, 3, 40, 32), (1, 3, 64, 64), (3, 32, 32), (1, 1, 32, 32)])
def test_pictures_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"this model takes \(B, 3, 32, 32\)"):
        tiny_model().encode_image(torch.zeros(shape))


def test_bytes_have_the_features_of_the_pixels_that_they_become() -> None:
    model, levels = tiny_model(), torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():  # what it leaves for later calls must serve training too
        expected = model.encode_image(normalised(levels))
        torch.testing.assert_close(model.encode_image(levels), expected, atol=0, rtol=0)
        assert not torch.equal(model.encode_image(levels.float()), expected)
    model.encode_image(levels).sum().backward()
    assert model.visual.conv1.weight.grad is not None


def test_texts_longer_than_the_position_table_are_refused() -> None:
    model = tiny_model()
    with torch.inference_mode():
        assert model.encode_text(torch.ones(1, 512, dtype=torch.long)).shape == (1, 24)
    with pytest.raises(ConfigError, match="texts of 513 tokens; this model takes at most 512"):
        model.encode_text(torch.ones(1, 513, dtype=torch.long))


def test_unknown_fields_of_a_model_are_refused() -> None:
    info = CONFIGS["vit"].info()
    with pytest.raises(TypeError, match="colour"):
        CLIP(**info, colour="red")
    del info["embed_dim"]
    with pytest.raises(TypeError, match="embed_dim"):
        CLIP(**info)


def test_the_flash_attention_switch_is_accepted_and_changes_nothing() -> None:
    model = CLIP(**CONFIGS["vit"].info(), use_flash_attention=True)
    assert model.state_dict().keys() == tiny_model().state_dict().keys()


# --- masking ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "kept"), [(0.5, 8), (0.25, 12), (0.9, 1), (0.94, 0)])
def test_masking_keeps_the_class_token_and_its_share_of_patches(ratio: float, kept: int) -> None:
    x = torch.arange(17.0).expand(3, 17)[..., None].clone()
    masked = keep_random_patches(x, ratio)[..., 0]
    assert masked.shape == (3, 1 + kept)
    assert torch.equal(masked[:, 0], torch.zeros(3))
    for row in masked[:, 1:].tolist():
        assert len(set(row)) == kept
        assert set(row) <= set(range(1, 17))


def test_masking_draws_other_patches_for_each_picture() -> None:
    masked = keep_random_patches(torch.arange(65.0).expand(2, 65)[..., None].clone(), 0.5)[..., 0]
    assert set(masked[0].tolist()) != set(masked[1].tolist())


def test_the_vit_masks_and_the_resnet_does_not() -> None:
    for kind in CONFIGS:
        model = tiny_model(kind)
        pixels = tiny_pixels(model)
        with torch.inference_mode():
            masked, whole = model.encode_image(pixels, mask_ratio=0.5), model.encode_image(pixels)
        assert torch.equal(masked, whole) == isinstance(model.visual, ModifiedResNet)
        assert masked.shape == whole.shape


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.5])
def test_a_mask_ratio_outside_its_range_is_refused(ratio: float) -> None:
    model = tiny_model()
    with pytest.raises(ConfigError, match=r"mask_ratio: expected a value in \[0, 1\)"):
        model.encode_image(tiny_pixels(model), mask_ratio=ratio)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_gradient_checkpointing_gives_the_same_gradients(kind: str, device: torch.device) -> None:
    gradients = []
    for enable in (False, True):
        model = tiny_model(kind).train().to(device)
        model.set_grad_checkpointing(enable)
        torch.manual_seed(5)  # dropout draws the same masks
        images, texts, scale = model(tiny_pixels(model).to(device), TOKENS.to(device))
        (scale * images @ texts.t()).logsumexp(dim=1).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    plain, recomputed = gradients
    for name, gradient in plain.items():
        assert gradient is not None, name
        torch.testing.assert_close(recomputed[name], gradient, msg=name)


def test_a_new_model_starts_as_documented() -> None:
    model = CLIP.from_config(CONFIGS["resnet"])
    assert model.logit_scale.item() == pytest.approx(2.6592600369327779)
    assert isinstance(model.visual, ModifiedResNet)
    assert not model.visual.state_dict()["layer1.0.bn3.weight"].any()
    assert float(model.text_projection.std().detach()) == pytest.approx(64**-0.5, rel=0.1)


# --- types ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vision", "text"), [("ViT-B-16", "RoBERTa-wwm-ext-base-chinese"), ("RN50", "RBT3-chinese")])
def test_the_same_parameters_turn_to_half_precision_as_in_the_reference(vision: str, text: str) -> None:
    golden = json.loads(gzip.decompress((GOLDEN / "weights.json.gz").read_bytes()))[vision]
    with torch.device("meta"):
        model = CLIP.from_config(zoo.model_config(vision, text))
        convert_weights(model)
    types = {name: value.dtype for name, value in model.state_dict().items() if value.is_floating_point()}
    assert [name for name, dtype in types.items() if dtype == torch.float32] == golden["float32"]
    assert [name for name, dtype in types.items() if dtype == torch.float16] == golden["float16"]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_converted_model_computes_in_its_type_and_stays_close(
    kind: str, dtype: torch.dtype, device: torch.device
) -> None:
    model, tokens = tiny_model(kind).to(device), TOKENS.to(device)
    pixels = tiny_pixels(model).to(device)
    with torch.inference_mode():
        exact = model(pixels, tokens)
        convert_weights(model, dtype)
        rough = model(pixels, tokens)
        assert model.encode_image(pixels).dtype == dtype
        assert model.encode_text(tokens).dtype == dtype
    for rows, expected in zip(rough[:2], exact[:2], strict=True):
        assert float((rows.float() * expected).sum(dim=1).min()) > 0.99


def test_converting_back_turns_every_parameter_to_float32() -> None:
    model = tiny_model()
    before = {name: value.half().float() for name, value in model.state_dict().items()}
    convert_weights(model)
    convert_models_to_fp32(model)
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert torch.equal(model.text_projection, before["text_projection"])


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_resize_pos_embed_fits_a_state_dict_in_place(wrapped: bool, prefix: str) -> None:
    model = tiny_model()
    key = f"{prefix}visual.positional_embedding"
    state = {key: torch.randn(10, 64), "other": torch.ones(1)}
    target = torch.nn.DataParallel(model) if wrapped else model
    resize_pos_embed(state, target, prefix=prefix)
    assert state[key].shape == (17, 64)
    kept = state[key]
    resize_pos_embed(state, target, prefix=prefix)
    assert state[key] is kept
