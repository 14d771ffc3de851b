"""What public programs do with `cn_clip.clip`, as functions that run under the reference and under this package.

`tools/golden/record_uses.py` runs them with the reference and keeps what they return;
`test_reference_surface_clip.py` runs them here and compares. Each returns names and values: tensors, numbers, texts.
"""

# B batch, L tokens, D width, H heads

import copy
import inspect
import io
import pickle
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from deterministic import picture_bytes, state_dict
from PIL import Image
from torch import nn

import cn_clip.clip as clip
from cn_clip.clip import bert_tokenizer, model, utils
from cn_clip.clip.configuration_bert import BertConfig
from cn_clip.clip.model import CLIP, convert_weights
from cn_clip.clip.modeling_bert import (
    ACT2FN,
    BertEncoder,
    BertLayer,
    BertModel,
    BertOnlyMLMHead,
    BertPooler,
    BertPreTrainedModel,
    BertPreTrainingHeads,
    BertSelfOutputForFlashAttention,
    gelu_new,
)

VIT = {
    "embed_dim": 24,
    "image_resolution": 32,
    "vision_layers": 3,
    "vision_width": 64,
    "vision_patch_size": 8,
    "vocab_size": 120,
    "text_attention_probs_dropout_prob": 0.1,
    "text_hidden_act": "gelu",
    "text_hidden_dropout_prob": 0.1,
    "text_hidden_size": 48,
    "text_initializer_range": 0.02,
    "text_intermediate_size": 96,
    "text_max_position_embeddings": 64,
    "text_num_attention_heads": 2,
    "text_num_hidden_layers": 3,
    "text_type_vocab_size": 2,
    "vision_head_width": 32,
}
RESNET = {
    **VIT,
    "image_resolution": 64,
    "vision_layers": [1, 2, 1, 1],
    "vision_width": 8,
    "vision_patch_size": None,
    "vision_head_width": 64,
}
TOKENS = torch.tensor([[101, 46, 13, 80, 102, 0], [101, 32, 102, 0, 0, 0], [101, 7, 8, 9, 10, 102]])

Values = dict[str, Any]


def fill(module: nn.Module, prefix: str = "") -> nn.Module:
    """The module with weights anyone can make again, float32, in eval mode."""
    shapes = [(name, tuple(value.shape)) for name, value in module.state_dict().items()]
    tensors = state_dict((f"{prefix}{name}", shape) for name, shape in shapes)
    module.load_state_dict({name: torch.from_numpy(tensors[f"{prefix}{name}"]) for name, _ in shapes})
    return module.float().eval()


def small(info: dict[str, Any] = VIT, **changes: Any) -> Any:
    return fill(CLIP(**{**info, **changes}))


def small_bert(**changes: Any) -> Any:
    settings = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 96}
    return fill(BertModel(BertConfig(120, **{**settings, "max_position_embeddings": 64, **changes})), "bert.")


def pixels(side: int = 32, count: int = 2) -> torch.Tensor:
    rows = [picture_bytes(number, side, side).transpose(2, 0, 1) for number in range(count)]
    return torch.from_numpy(np.stack(rows).astype(np.float32) / 128 - 1)


def embedded(visual: Any, image: torch.Tensor) -> torch.Tensor:
    """What goes into the transformer, (L, B, D): the lines every patch-feature program begins with."""
    x = visual.conv1(image)
    x = x.reshape(x.shape[0], x.shape[1], -1).permute(0, 2, 1)
    token = visual.class_embedding.to(x.dtype) + torch.zeros(x.shape[0], 1, x.shape[-1], dtype=x.dtype)
    x = torch.cat([token, x], dim=1) + visual.positional_embedding.to(x.dtype)
    return visual.ln_pre(x).permute(1, 0, 2)


@contextmanager
def patched(owner: Any, **attributes: Any) -> Iterator[None]:
    before = {name: getattr(owner, name) for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


# --- inside the Vision Transformer ------------------------------------------------------------------------------------


def patch_features() -> Values:
    tower, image = small().visual, pixels()
    x = tower.transformer(embedded(tower, image)).permute(1, 0, 2)
    every = tower.ln_post(x) @ tower.proj
    return {"every": every, "first": every[:, 0], "direct": tower(image), "masked": tower(image, 0).shape}


def blocks_by_hand() -> Values:
    tower = small().visual
    x = embedded(tower, pixels())
    stages = []
    for block in tower.transformer.resblocks:
        x = block(x)
        stages.append(x)
    return {"stages": torch.stack(stages), "sequence": tower.transformer.resblocks(embedded(tower, pixels()))}


def parts_of_a_block_by_hand() -> Values:
    tower = small().visual
    block, x = tower.transformer.resblocks[1], embedded(tower, pixels())
    attended = block.attn(block.ln_1(x), block.ln_1(x), block.ln_1(x), need_weights=False)[0]
    x1 = x + attended
    return {"attended": attended, "method": block.attention(block.ln_1(x)), "out": x1 + block.mlp(block.ln_2(x1))}


def hooks_on_blocks() -> Values:
    whole, image = small(), pixels()
    seen: Values = {}
    for number, block in enumerate(whole.visual.transformer.resblocks):
        block.register_forward_hook(lambda _, i, o, n=number: seen.update({f"in{n}": i[0], f"out{n}": o}))
    seen["result"] = whole.encode_image(image)
    return seen


def hook_on_the_last_block_before_it() -> Values:
    whole = small()
    seen: Values = {}
    whole.visual.transformer.resblocks[-1].register_forward_pre_hook(lambda _, i: seen.update(x=i[0]))
    seen["result"] = whole.visual(pixels())
    return seen


def hook_on_the_transformer() -> Values:
    whole = small()
    seen: Values = {}
    whole.visual.transformer.register_forward_hook(lambda _, i, o: seen.update(i=i[0], o=o))
    whole.visual.transformer.resblocks.register_forward_hook(lambda _, i, o: seen.update(s=o))
    seen["result"] = whole.visual(pixels())
    return seen


def hooks_on_every_part() -> Values:
    whole = small()
    seen: Values = {}

    def keep(name: str, output: Any) -> None:
        seen[name] = output[0] if isinstance(output, tuple) else output

    for name, part in whole.visual.named_modules():
        if name and not name.endswith("out_proj"):  # which the reference computes without calling it
            part.register_forward_hook(lambda _, i, o, name=name: keep(name, o))
    seen["result"] = whole.encode_image(pixels())
    return seen


def a_hook_that_changes_a_block() -> Values:
    whole = small()
    whole.visual.transformer.resblocks[0].register_forward_hook(lambda _, i, o: o * 0.5)
    whole.visual.transformer.resblocks[-1].register_forward_hook(lambda _, i, o: o + 1)
    return {"result": whole.encode_image(pixels())}


def grad_cam_of_a_vit() -> Values:
    whole, kept = small(), {}
    layer = whole.visual.transformer.resblocks[-1].ln_1
    layer.register_forward_hook(lambda _, i, o: kept.update(activation=o))
    layer.register_full_backward_hook(lambda _, i, o: kept.update(gradient=o[0]))
    per_image, _ = whole.get_similarity(pixels().requires_grad_(True), TOKENS)
    per_image[:, 0].sum().backward()
    activation, gradient = kept["activation"].permute(1, 0, 2)[:, 1:], kept["gradient"].permute(1, 0, 2)[:, 1:]
    return {"cam": (activation * gradient.mean(dim=1, keepdim=True)).sum(-1), "shape": kept["gradient"].shape}


def attention_rollout() -> Values:
    tower = small().visual
    x, rollout = embedded(tower, pixels()), torch.eye(17)
    for block in tower.transformer.resblocks:
        normed = block.ln_1(x)
        _, weights = block.attn(normed, normed, normed, need_weights=True)
        rollout = (weights + torch.eye(17)) / 2 @ rollout
        x = block(x)
    return {"rollout": rollout}


def attention_of_each_head() -> Values:
    tower = small().visual
    attn, x = tower.transformer.resblocks[0].attn, embedded(tower, pixels())
    out, weights = attn(query=x, key=x, value=x, need_weights=True, average_attn_weights=False)
    padding = torch.zeros(2, 17, dtype=torch.bool)
    padding[1, 5:] = True
    bias = torch.linspace(-1, 1, 17 * 17).reshape(17, 17)
    masked, seen = attn(x, x, x, key_padding_mask=padding, attn_mask=bias)
    forbidden, _ = attn(x[:3], x, x + 1, attn_mask=bias[:3] > 0.9)
    per_head, _ = attn(x, x, x, attn_mask=bias.expand(4, 17, 17), need_weights=False)
    one, one_weights = attn(x[:, 0], x[:, 0], x[:, 0])
    names = ("num_heads", "embed_dim", "head_dim", "batch_first", "dropout")
    return {
        **{"out": out, "weights": weights, "masked": masked, "seen": seen, "forbidden": forbidden, "one": one},
        **{"one_weights": one_weights, "per_head": per_head, **{name: getattr(attn, name) for name in names}},
        "is": isinstance(attn, nn.MultiheadAttention),
        "shapes": [tuple(attn.in_proj_weight.shape), tuple(attn.in_proj_bias.shape), tuple(attn.out_proj.weight.shape)],
    }


def attention_of_an_instance_replaced() -> Values:
    whole, kept = small(), []

    def attention(self: Any, x: torch.Tensor) -> torch.Tensor:
        out, weights = self.attn(x, x, x, need_weights=True, attn_mask=self.attn_mask, average_attn_weights=False)
        kept.append(weights)
        return out

    for block in whole.visual.transformer.resblocks:
        block.attention = MethodType(attention, block)
    return {"result": whole.encode_image(pixels()), "weights": torch.stack(kept)}


def attention_of_the_class_replaced() -> Values:
    kind, shapes = model.ResidualAttentionBlock, []
    old_init, old_attention = kind.__init__, kind.attention

    def init(self: Any, d_model: int, n_head: int, attn_mask: Any = None, use_flash_attention: bool = False) -> None:
        old_init(self, d_model, n_head, attn_mask)
        self.heads_given = n_head

    def attention(self: Any, x: torch.Tensor) -> torch.Tensor:
        shapes.append((*x.shape, self.heads_given))
        return old_attention(self, x) * 0.5

    with patched(kind, __init__=init, attention=attention):
        return {"result": small().encode_image(pixels()), "shapes": shapes}


def forward_of_the_class_replaced() -> Values:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return x + self.attention(self.ln_1(x))

    with patched(model.ResidualAttentionBlock, forward=forward):
        return {"result": small().encode_image(pixels())}


def forward_of_an_instance_replaced() -> Values:
    whole = small()

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.ln_post(self.transformer(embedded(self, x)).permute(1, 0, 2)[:, 1:]) @ self.proj

    whole.visual.forward = MethodType(forward, whole.visual)
    last = whole.visual.transformer.resblocks[-1]
    last.forward = lambda x: x + last.mlp(last.ln_2(x))
    return {"result": whole.visual(pixels())}


class Adapted(nn.Module):
    """A block in a wrapper, as adapters and prompt tuning put them."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x) + 0.1 * x.mean(dim=0, keepdim=True)


def blocks_in_wrappers() -> Values:
    whole = small()
    blocks = whole.visual.transformer.resblocks
    for number in range(len(blocks)):
        blocks[number] = Adapted(blocks[number])
    return {"result": whole.encode_image(pixels()), "names": [name for name, _ in whole.visual.named_parameters()][:6]}


def perceptron_with_a_part_over_the_tokens() -> Values:
    class Mixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - x.mean(dim=0, keepdim=True)

    whole = small()
    for block in whole.visual.transformer.resblocks:
        block.mlp = nn.Sequential(block.mlp, Mixed())
    return {"result": whole.encode_image(pixels())}


def attention_of_another_module() -> Values:
    whole = small()
    for block in whole.visual.transformer.resblocks:
        other = nn.MultiheadAttention(64, 2).eval()
        other.load_state_dict(block.attn.state_dict())
        block.attn = other
    return {"result": whole.encode_image(pixels())}


def visual_prompts() -> Values:
    tower, image = small().visual, pixels()
    prompts = torch.linspace(-1, 1, 2 * 64).reshape(2, 1, 64).expand(2, 2, 64)
    x = embedded(tower, image)
    x = tower.transformer(torch.cat([x[:1], prompts, x[1:]], dim=0))
    return {"result": tower.ln_post(x[0]) @ tower.proj}


def without_projection() -> Values:
    tower = small().visual
    tower.proj = None
    return {"result": tower(pixels()), "resolution": tower.input_resolution, "grid": tower.grid_size}


def other_resolution_by_surgery() -> Values:
    whole = small()
    tower = whole.visual
    grid = tower.positional_embedding[1:].reshape(1, 4, 4, 64).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=(6, 6), mode="bilinear").permute(0, 2, 3, 1).reshape(36, 64)
    tower.positional_embedding = nn.Parameter(torch.cat([tower.positional_embedding[:1], grid]))
    return {"result": whole.encode_image(pixels(48))}


def towers_by_position() -> Values:
    vit = fill(model.VisualTransformer(32, 8, 64, 2, 2, 24, False), "visual.")
    block = fill(model.ResidualAttentionBlock(64, 4, None, False), "block.")
    causal = torch.full((5, 5), float("-inf")).triu(1)
    stack = fill(model.Transformer(64, 2, 4, causal), "stack.")
    rows = torch.linspace(-2, 2, 5 * 3 * 64).reshape(5, 3, 64).sin()
    names = ("width", "layers", "grad_checkpointing")
    return {
        **{"vit": vit(pixels()), "block": block(rows), "stack": stack(rows), "grid": vit.grid_size},
        **{name: getattr(stack, name) for name in names},
        "mask": block.attn_mask is None and stack.resblocks[0].attn_mask,
    }


def masking() -> Values:
    tower = small().visual
    rows = torch.arange(2 * 17, dtype=torch.float32).reshape(2, 17, 1).expand(2, 17, 64)
    kept = tower.random_masking(rows, 0.5)
    return {"shape": kept.shape, "first": kept[:, 0], "features": tower(pixels(), 0.5).shape}


def layer_norm_and_gelu() -> Values:
    norm, gelu = fill(model.LayerNorm(8), "ln_."), model.QuickGELU()
    rows = torch.linspace(-3, 3, 16).reshape(2, 8)
    return {"norm": norm(rows), "half": norm(rows.half()).dtype == torch.float16, "gelu": gelu(rows)}


# --- inside the ResNet ------------------------------------------------------------------------------------------------


def resnet_stages() -> Values:
    whole, image = small(RESNET), pixels(64)
    tower, seen = whole.visual, {}
    for stage in (1, 2, 3, 4):
        getattr(tower, f"layer{stage}").register_forward_hook(lambda _, i, o, n=stage: seen.update({f"layer{n}": o}))
    seen["result"] = whole.encode_image(image)
    seen["pooled"] = tower.attnpool(seen["layer4"])
    return seen


def resnet_by_hand() -> Values:
    tower, x = small(RESNET).visual, pixels(64)
    for conv, norm in [(tower.conv1, tower.bn1), (tower.conv2, tower.bn2), (tower.conv3, tower.bn3)]:
        x = tower.relu(norm(conv(x)))
    x = tower.layer4(tower.layer3(tower.layer2(tower.layer1(tower.avgpool(x)))))
    names = ("input_resolution", "output_dim")
    return {"map": x, "result": tower.attnpool(x), **{name: getattr(tower, name) for name in names}}


def grad_cam_of_a_resnet() -> Values:
    whole, kept = small(RESNET), {}
    whole.visual.layer4.register_forward_hook(lambda _, i, o: kept.update(activation=o))
    whole.visual.layer4.register_full_backward_hook(lambda _, i, o: kept.update(gradient=o[0]))
    per_image, _ = whole.get_similarity(pixels(64), TOKENS)
    per_image[:, 1].sum().backward()
    batch, channels = kept["gradient"].shape[:2]
    weights = kept["gradient"].reshape(batch, channels, -1).mean(-1)
    return {"cam": (kept["activation"] * weights[:, :, None, None]).sum(1).relu()}


def resnet_by_position() -> Values:
    tower = fill(model.ModifiedResNet([1, 1, 1, 1], 24, 4, 64, 8), "visual.")
    block = fill(model.Bottleneck(16, 8, 2), "layer.bn.")
    pool = fill(model.AttentionPool2d(2, 32, 4), "pool.")
    maps = torch.linspace(-1, 1, 2 * 16 * 16).reshape(2, 16, 4, 4).sin()
    defaults = model.ModifiedResNet([1, 1, 1, 1], 24, 32)
    return {
        **{"tower": tower(pixels(64)), "block": block(maps), "pool": pool(maps.reshape(2, 32, 4, 2)[:, :, :2])},
        **{"stride": block.stride, "expansion": model.Bottleneck.expansion, "heads": pool.num_heads},
        "defaults": [defaults.input_resolution, defaults.conv3.out_channels, defaults._inplanes],
        "gain": float(defaults.layer1[0].bn3.weight.detach().mean()),
    }


# --- inside BERT ------------------------------------------------------------------------------------------------------


def two_values_of_bert() -> Values:
    bert = small().bert
    outputs = bert(TOKENS, attention_mask=TOKENS.ne(0).float())
    hidden, pooled = bert(TOKENS, TOKENS.ne(0))
    return {"length": len(outputs), "hidden": outputs[0], "again": hidden, "pooled": pooled, "whole": bert(TOKENS)[0]}


def arguments_of_bert() -> Values:
    bert = small().bert
    types, places = torch.ones_like(TOKENS), torch.arange(6).flip(0).expand_as(TOKENS)
    heads = torch.tensor([[1.0, 0.0], [0.5, 1.0], [1.0, 1.0]])
    mask = TOKENS.ne(0).float()
    return {
        "types": bert(TOKENS, token_type_ids=types)[0],
        "places": bert(TOKENS, mask, None, places)[0],
        "all": bert(TOKENS, mask, types, places, heads)[0],
        "one_row_of_heads": bert(TOKENS, mask, head_mask=heads[0])[0],
        "embeddings": bert.embeddings(TOKENS),
        "embeddings_of": bert.embeddings(TOKENS, types, places),
        "embeddings_named": bert.embeddings(input_ids=TOKENS, position_ids=places),
    }


def all_outputs_of_bert() -> Values:
    bert = small_bert(output_attentions=True, output_hidden_states=True)
    sequence, pooled, states, attentions = bert(TOKENS, TOKENS.ne(0))
    only = small_bert(output_hidden_states=True)(TOKENS)
    return {
        **{
            "sequence": sequence,
            "pooled": pooled,
            "states": torch.stack(states),
            "attentions": torch.stack(attentions),
        },
        "lengths": [len(states), len(attentions), len(only)],
    }


def outputs_switched_on_later() -> Values:
    whole = small()
    whole.bert.encoder.output_hidden_states = whole.bert.encoder.output_attentions = True
    for layer in whole.bert.encoder.layer:
        layer.attention.self.output_attentions = True
    outputs = whole.bert(TOKENS, TOKENS.ne(0))
    return {"features": whole.encode_text(TOKENS), "last": outputs[2][-1], "attention": outputs[3][-1]}


def prompt_tuning() -> Values:
    """Learned vectors between [CLS] and the words, through embeddings and encoder, as CoOp does."""
    whole = small()
    bert = whole.bert
    words = bert.embeddings.word_embeddings(TOKENS)
    context = torch.linspace(-0.5, 0.5, 4 * 48).reshape(1, 4, 48).expand(3, 4, 48)
    rows = torch.cat([words[:, :1], context, words[:, 1:]], dim=1)
    places = bert.embeddings.position_embeddings(torch.arange(10)[None])
    types = bert.embeddings.token_type_embeddings(torch.zeros(1, 10, dtype=torch.long))
    rows = bert.embeddings.dropout(bert.embeddings.LayerNorm(rows + places + types))
    mask = torch.cat([torch.ones(3, 4), TOKENS.ne(0).float()], dim=1)
    extended = (1.0 - mask[:, None, None, :].to(dtype=next(bert.parameters()).dtype)) * -10000.0
    encoded = bert.encoder(rows, extended, head_mask=[None] * bert.config.num_hidden_layers)
    return {"features": encoded[0][:, 0] @ whole.text_projection, "kind": type(encoded).__name__, "n": len(encoded)}


def layers_by_hand() -> Values:
    bert = small().bert
    x, mask = bert.embeddings(TOKENS), (1.0 - TOKENS.ne(0).float())[:, None, None] * -10000.0
    stages = []
    for layer in bert.encoder.layer:
        x = layer(x, mask)
        stages.append(x)
    layer = bert.encoder.layer[0]
    attended = layer.attention(x, mask)
    inner = layer.attention.self(x, mask)
    return {
        **{"stages": torch.stack(stages), "no_mask": layer(x), "tuple": [len(attended), len(inner)]},
        "out": layer.output(layer.intermediate(attended[0]), attended[0]),
        "inner": layer.attention.output(inner[0], x),
        "heads": [layer.attention.self.num_attention_heads, layer.attention.self.attention_head_size],
        "split": layer.attention.self.transpose_for_scores(x),
    }


def hooks_on_every_layer_of_bert() -> Values:
    whole = small()
    seen: Values = {}

    def keep(name: str, output: Any) -> None:
        seen[name] = output[0] if isinstance(output, tuple) else output

    for name, part in whole.bert.named_modules():
        part.register_forward_hook(lambda _, i, o, name=name: keep(name or "bert", o))
    seen["result"] = whole.encode_text(TOKENS)
    return seen


def attention_by_the_dropout() -> Values:
    whole, seen = small(), []
    for layer in whole.bert.encoder.layer:
        layer.attention.self.dropout.register_forward_hook(lambda _, i, o: seen.append(o))
    return {"result": whole.encode_text(TOKENS), "probabilities": torch.stack(seen)}


def bert_in_wrappers() -> Values:
    class Wrapped(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, hidden_states: Any, attention_mask: Any = None, head_mask: Any = None) -> Any:
            return self.layer(hidden_states, attention_mask, head_mask) * 0.5

    whole = small()
    layers = whole.bert.encoder.layer
    for number in range(len(layers)):
        layers[number] = Wrapped(layers[number])
    other = small()
    inner = other.bert
    other.bert = BertOfAnother(inner)
    return {"layers": whole.encode_text(TOKENS), "bert": other.encode_text(TOKENS)}


class BertOfAnother(nn.Module):
    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.inner = bert

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        hidden = self.inner(ids, attention_mask=attention_mask)[0]
        return (hidden + hidden.mean(dim=1, keepdim=True), None)


def methods_of_bert_replaced() -> Values:
    def forward(self: Any, hidden_states: Any, attention_mask: Any = None, head_mask: Any = None) -> Any:
        return hidden_states + self.intermediate.dense(hidden_states)[..., :48]

    def self_attention(self: Any, hidden_states: Any, attention_mask: Any = None, head_mask: Any = None) -> Any:
        return (self.value(hidden_states),)

    whole = small()
    with patched(BertLayer, forward=forward):
        results = {"layer": whole.encode_text(TOKENS)}
    with patched(type(whole.bert.encoder.layer[0].attention.self), forward=self_attention):
        results["attention"] = whole.encode_text(TOKENS)
    return {**results, "as_before": whole.encode_text(TOKENS)}


class TextTower(nn.Module):
    """The text half of Chinese-CLIP by itself, as audio and video projects build it."""

    def __init__(self, config: BertConfig, embed_dim: int, tokenizer: Any = clip._tokenizer) -> None:
        super().__init__()
        self.bert_config = config
        self.bert = BertModel(config)
        self.bert.encoder.grad_checkpointing = False
        self.text_projection = nn.Parameter(torch.empty(config.hidden_size, embed_dim))
        self.tokenizer = tokenizer
        nn.init.normal_(self.text_projection, std=self.bert_config.hidden_size**-0.5)

    def forward(self, text: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        mask = text.ne(self.tokenizer.vocab["[PAD]"]).type(dtype)
        return self.bert(text, attention_mask=mask)[0].type(dtype)[:, 0, :] @ self.text_projection


def a_text_tower_of_ones_own() -> Values:
    whole = small()
    tower = fill(TextTower(whole.bert_config, 24))
    return {"result": tower(TOKENS), "same": whole.encode_text(TOKENS), "names": list(tower.state_dict())[:9]}


def a_fusion_encoder_of_ones_own() -> Values:
    config = BertConfig(10, 48, 2, 2, 96, hidden_act="relu", hidden_dropout_prob=0.0)
    layer, encoder = fill(BertLayer(config), "layer."), fill(BertEncoder(config), "encoder.")
    rows = torch.linspace(-1, 1, 2 * 3 * 48).reshape(2, 3, 48).cos()
    mask = torch.tensor([[[[0.0, 0.0, -10000.0]]], [[[0.0, 0.0, 0.0]]]])
    return {"layer": layer(rows, mask), "encoder": encoder(rows, mask, [None, None])[0]}


def settings_of_bert() -> Values:
    config = small().bert_config
    defaults = vars(BertConfig())
    return {
        "clip": dict(sorted(vars(config).items())),
        "defaults": dict(sorted(defaults.items())),
        "same": small().bert.config.hidden_size,
        "class": BertPreTrainedModel.config_class is BertConfig and BertPreTrainedModel.base_model_prefix,
    }


def heads_of_bert() -> Values:
    config = BertConfig(20, 16, 1, 2, 32)
    rows = torch.linspace(-1, 1, 2 * 3 * 16).reshape(2, 3, 16).sin()
    pooled = fill(BertPooler(config), "pooler.")(rows)
    scores, relation = fill(BertPreTrainingHeads(config), "cls.")(rows, pooled)
    return {
        **{"pooled": pooled, "scores": scores, "relation": relation},
        "mlm": fill(BertOnlyMLMHead(config), "mlm.")(rows),
        "names": list(BertPreTrainingHeads(config).state_dict()),
        "flash": fill(BertSelfOutputForFlashAttention(config), "flash.LayerNorm")(rows, rows),
        "activations": {
            name: float(function(torch.tensor(0.7))) for name, function in sorted(ACT2FN.items()) if name != "silu"
        },
        "gelu_new": gelu_new(rows),
    }


# --- the whole model --------------------------------------------------------------------------------------------------


def model_by_position() -> Values:
    given = [VIT[name] for name in list(VIT) if name != "vision_head_width"]
    whole = fill(CLIP(*given, clip._tokenizer, 32, False))
    return {"names": list(whole.state_dict()), "image": whole.encode_image(pixels()), "text": whole.encode_text(TOKENS)}


def three_values() -> Values:
    whole = small()
    image, text, scale = whole(pixels(), TOKENS)
    per_image, per_text = whole.get_similarity(pixels(), TOKENS)
    return {
        **{"image": image, "text": text, "scale": scale, "per_image": per_image, "per_text": per_text},
        **{
            "text_only": whole(None, TOKENS),
            "image_only": whole(pixels(), None),
            "scale_again": whole.logit_scale.exp(),
        },
        **{"parallel": nn.DataParallel(whole)(pixels(), TOKENS)[0], "dtype": str(whole.dtype)},
    }


def tokenizer_of_the_model() -> Values:
    whole = small()
    mask = TOKENS.ne(whole.tokenizer.vocab["[PAD]"]).type(whole.dtype)
    x = whole.bert(TOKENS, attention_mask=mask)[0].type(whole.dtype)
    whole.tokenizer = SpokenPad()
    return {"text": x[:, 0, :] @ whole.text_projection, "other_padding": whole.encode_text(TOKENS)}


class SpokenPad:
    """A tokenizer that pads with another id."""

    def __init__(self) -> None:
        self.vocab = {"[PAD]": 102}


def parameters_drawn_again() -> Values:
    whole = small(RESNET)
    torch.manual_seed(0)
    whole.initialize_parameters()
    pool = whole.visual.attnpool
    spread = [float(pool.q_proj.weight.detach().std()), float(whole.text_projection.detach().std())]
    return {
        "scale": whole.logit_scale,
        "zero": float(whole.visual.layer2[1].bn3.weight.detach().abs().sum()),
        "spread": [round(value, 2) for value in spread],
        "bias": pool.q_proj.bias,
    }


def copies_and_files() -> Values:
    whole, buffer = small(), io.BytesIO()
    torch.save(whole, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    copied, pickled = copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))
    return {
        name: one.encode_image(pixels()) + one.encode_text(TOKENS)[:2]
        for name, one in {"saved": again, "copied": copied, "pickled": pickled}.items()
    }


def training_with_frozen_layers() -> Values:
    whole = small().train()
    for module in whole.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for parameter in whole.parameters():
        parameter.requires_grad = False
    for layer in (*whole.visual.transformer.resblocks[-1:], *whole.bert.encoder.layer[-1:]):
        for parameter in layer.parameters():
            parameter.requires_grad = True
    whole.set_grad_checkpointing(False)
    image, text, scale = whole(pixels().repeat(2, 1, 1, 1)[:3], TOKENS)
    loss = nn.functional.cross_entropy(scale * image @ text.t(), torch.arange(3))
    loss.backward()
    gradients = {name: value.grad for name, value in whole.named_parameters() if value.grad is not None}
    return {"loss": loss, **{name: gradients[name] for name in sorted(gradients)[::5]}, "names": sorted(gradients)}


def weights_in_half() -> Values:
    whole = small()
    convert_weights(whole)
    kinds = {name: str(value.dtype) for name, value in whole.named_parameters()}
    own = small()

    def half(part: nn.Module) -> None:  # the copy of `convert_weights` found in many programs
        if isinstance(part, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            part.weight.data = part.weight.data.half()
            if part.bias is not None:
                part.bias.data = part.bias.data.half()
        if isinstance(part, nn.MultiheadAttention):
            for name in [*[f"{s}_proj_weight" for s in ["in", "q", "k", "v"]], "in_proj_bias", "bias_k", "bias_v"]:
                tensor = getattr(part, name)
                if tensor is not None:
                    tensor.data = tensor.data.half()
        if isinstance(part, BertModel):
            part.to(torch.half)
        for name in ["text_projection", "proj"]:
            if hasattr(part, name) and getattr(part, name) is not None:
                getattr(part, name).data = getattr(part, name).data.half()

    own.apply(half)
    model.convert_models_to_fp32(whole)
    return {
        "kinds": kinds,
        "own": {name: str(value.dtype) for name, value in own.named_parameters()},
        "back": sorted({str(value.dtype) for value in whole.parameters()}),
    }


def positions_resized() -> Values:
    whole = small()
    rows = torch.linspace(-1, 1, 10 * 64).reshape(10, 64).sin()
    results: Values = {}
    for prefix, mode in (("", "bicubic"), ("module.", "bilinear")):
        state = {f"{prefix}visual.positional_embedding": rows.clone()}
        results[mode] = [model.resize_pos_embed(state, whole, mode, 1, prefix), *state.values()][1]
    state = {"visual.positional_embedding": rows.clone()}
    model.resize_pos_embed(state, nn.DataParallel(whole))
    results["wrapped"] = state["visual.positional_embedding"]
    model.resize_pos_embed(state, small(RESNET))
    return {**results, "resnet": state["visual.positional_embedding"], "nothing": model.resize_pos_embed({}, whole)}


def restored() -> Values:
    clip_side = {f"{name}": value * 0.5 for name, value in small().state_dict().items()}
    bert_side = {name: value * 2 for name, value in small().state_dict().items()}
    bert_side["bert.pooler.dense.weight"] = torch.zeros(48, 48)
    whole = small().train()
    result = utils.restore_model(whole, clip_side, None, False)
    first = result is whole, whole.training, whole.visual.conv1.weight.float(), whole.logit_scale.float()
    utils.restore_model(whole, None, bert_side, False)
    names = ("same", "training", "conv", "scale")
    return {**dict(zip(names, first, strict=True)), "word": whole.bert.embeddings.word_embeddings.weight[7].float()}


def fused_in_place() -> Values:
    state = {f"module.{name}": value for name, value in small().state_dict().items()}
    result = clip.convert_state_dict(state)
    return {"same": result is state, "names": sorted(state), "none": model.convert_state_dict(None)}


# --- names, texts and pictures ----------------------------------------------------------------------------------------


def tables_of_models() -> Values:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sub" / utils._MODELS["RN50"][1]
        path.parent.mkdir()
        path.write_bytes(b"weights")
        found = utils._download("RN50", str(path.parent)) == str(path)
    return {"models": utils._MODELS, "info": utils._MODEL_INFO, "found": found, "hubs": [utils._MODELSCOPE_ORG]}


SENTENCES = (
    "皮卡丘 Pikachu!",
    "Ünaffable\tnaïve\u00a0ＡＢ\u3000“引号”",
    "a\x00b\ufffdc\u200bd",
    "",
    "  ",
    "1.5km²的𠀀",
)


def helpers_of_the_tokenizer() -> Values:
    basic, full = bert_tokenizer.BasicTokenizer(), clip.FullTokenizer()
    pieces = [full.tokenize(sentence) for sentence in SENTENCES]
    chars = "a，, \t\n\x00\u200b一𠀀$~“¥"
    names = ("_is_whitespace", "_is_control", "_is_punctuation")
    cased = bert_tokenizer.FullTokenizer(bert_tokenizer.default_vocab(), False)
    vocab = bert_tokenizer.load_vocab(bert_tokenizer.default_vocab())
    return {
        **{name: [getattr(bert_tokenizer, name)(char) for char in chars] for name in names},
        "pieces": pieces,
        "ids": [full.convert_tokens_to_ids(row) for row in pieces],
        "back": [bert_tokenizer.convert_ids_to_tokens(full.inv_vocab, [101, 102]), full.convert_ids_to_tokens([103])],
        "text": full.convert_tokens_to_string(pieces[1]),
        "size": [full.vocab_size(), len(vocab), vocab["[PAD]"]],
        "cased": cased.tokenize("PIKA"),
        "bytes": full.tokenize("皮卡丘".encode()),
        "unicode": [bert_tokenizer.convert_to_unicode("丘".encode()), bert_tokenizer.printable_text("丘")],
        "by_vocab": [
            bert_tokenizer.convert_by_vocab({"a": 1}, ["a"]),
            bert_tokenizer.convert_tokens_to_ids({"a": 1}, ["a"]),
        ],
        "blanks": bert_tokenizer.whitespace_tokenize(" a  b\n"),
        "clean": basic._clean_text(SENTENCES[2]),
        "accents": basic._run_strip_accents("Ünä"),
        "marks": basic._run_split_on_punc("a,b。c"),
        "han": [basic._tokenize_chinese_chars("a皮b"), basic._is_chinese_char(0x4E00), basic._is_chinese_char(0x3042)],
        "wordpiece": bert_tokenizer.WordpieceTokenizer({"un", "##able"}, "?", 8).tokenize("unable unfit unableable"),
        "cases": [
            bert_tokenizer.validate_case_matches_checkpoint(True, "x/uncased_L-12_H-768_A-12/bert_model.ckpt"),
            bert_tokenizer.validate_case_matches_checkpoint(True, None),
            raised(lambda: bert_tokenizer.validate_case_matches_checkpoint(False, CASED)),
            raised(lambda: bert_tokenizer.validate_case_matches_checkpoint(True, CASED.replace("chinese", "cased"))),
            raised(lambda: bert_tokenizer.convert_to_unicode(7)),
            raised(lambda: full.convert_tokens_to_ids(["no such token"])),
            raised(lambda: bert_tokenizer.load_vocab("no/such/file")),
        ],
    }


CASED = "bert/chinese_L-12_H-768_A-12/bert_model.ckpt"


def raised(action: Callable[[], object]) -> str:
    """The types of the error, as `except` sees them, without those of this package."""
    try:
        action()
    except Exception as error:
        kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
        return "/".join(kinds)
    return "nothing"


def steps_of_the_preprocessing() -> Values:
    preprocess = clip.image_transform(32)
    picture = Image.fromarray(picture_bytes(3, 40, 52))
    steps = preprocess.transforms
    x: Any = picture
    for step in steps:
        x = step(x)
    kept = {
        "resized": np.asarray(steps[0](picture)),
        "tensor": steps[2](picture),
        "steps": x,
        "whole": preprocess(picture),
    }
    size, mean, std = steps[0].size, steps[-1].mean, steps[-1].std
    tensor = steps[0](steps[2](picture))
    back = tensor * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    grey = steps[2](Image.fromarray(picture_bytes(3, 4, 5)[:, :, 0]))
    preprocess.transforms.pop(3)
    shorter = preprocess(picture)
    preprocess.transforms = preprocess.transforms[-1:]
    return {
        **{
            **kept,
            "tensor_resized": tensor,
            "back": back,
            "grey": grey,
            "shorter": shorter,
            "last": preprocess(picture),
        },
        **{
            "size": size,
            "mean": mean,
            "std": std,
            "count": len(steps),
            "rgb": utils._convert_image_to_rgb(picture).mode,
        },
        "names": [type(step).__name__ for step in clip.image_transform().transforms],
        "pickled": pickle.loads(pickle.dumps(clip.image_transform(32)))(picture),
        "rows": steps[2](np.asarray(picture)),
    }


def signatures() -> Values:
    """Names and defaults of the arguments of what each module defines, and of the classes' methods."""
    found = {}
    for owner in (utils, model, bert_tokenizer, clip):
        for name, value in sorted(vars(owner).items()):
            if inspect.isroutine(value) and getattr(value, "__module__", "").startswith("cn_clip.clip"):
                found[f"{owner.__name__}:{name}"] = arguments(value)
    for kind in KINDS:
        for name, value in sorted(vars(kind).items()):
            if inspect.isfunction(value) and (name == "__init__" or not name.startswith("_")):
                found[f"{kind.__module__}:{kind.__name__}.{name}"] = arguments(value)
    return {"signatures": found}


KINDS = (
    *(model.CLIP, model.VisualTransformer, model.Transformer, model.ResidualAttentionBlock, model.ModifiedResNet),
    *(model.Bottleneck, model.AttentionPool2d, model.QuickGELU, BertConfig, BertModel, BertEncoder, BertLayer),
    *(BertPooler, clip.FullTokenizer, bert_tokenizer.BasicTokenizer, bert_tokenizer.WordpieceTokenizer),
)


def arguments(function: Any) -> list[str]:
    """ "name" or "name=default" of the positional arguments; a default that is a path, a device or an object is "…"."""
    rows = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            plain = isinstance(parameter.default, (int, float, bool)) or parameter.default in ("", "bicubic", "gelu")
            default = "" if parameter.default is parameter.empty else f"={parameter.default if plain else '…'}"
            rows.append(f"{parameter.name}{default}")
    return rows


USES: dict[str, Callable[[], Values]] = {
    use.__name__: use
    for use in (
        *(patch_features, blocks_by_hand, parts_of_a_block_by_hand, hooks_on_blocks, hook_on_the_last_block_before_it),
        *(hook_on_the_transformer, hooks_on_every_part, a_hook_that_changes_a_block, grad_cam_of_a_vit),
        *(attention_rollout, attention_of_each_head, attention_of_an_instance_replaced),
        *(attention_of_the_class_replaced, forward_of_the_class_replaced, forward_of_an_instance_replaced),
        *(blocks_in_wrappers, perceptron_with_a_part_over_the_tokens, attention_of_another_module, visual_prompts),
        *(without_projection, other_resolution_by_surgery, towers_by_position, masking, layer_norm_and_gelu),
        *(resnet_stages, resnet_by_hand, grad_cam_of_a_resnet, resnet_by_position),
        *(two_values_of_bert, arguments_of_bert, all_outputs_of_bert, outputs_switched_on_later, prompt_tuning),
        *(layers_by_hand, hooks_on_every_layer_of_bert, attention_by_the_dropout, bert_in_wrappers),
        *(methods_of_bert_replaced, a_text_tower_of_ones_own, a_fusion_encoder_of_ones_own, settings_of_bert),
        *(heads_of_bert, model_by_position, three_values, tokenizer_of_the_model, parameters_drawn_again),
        *(copies_and_files, training_with_frozen_layers, weights_in_half, positions_resized, restored),
        *(fused_in_place, tables_of_models, helpers_of_the_tokenizer),
        *(steps_of_the_preprocessing, signatures),
    )
}


def plain(value: Any, samples: int = 16) -> Any:
    """The value as JSON: a tensor as its shape and a few of its values, spread over it."""
    if isinstance(value, torch.Tensor):
        value = value.detach().float().numpy()
    if isinstance(value, np.ndarray):
        flat = value.astype(np.float64).reshape(-1)
        picked = flat[np.linspace(0, len(flat) - 1, min(samples, len(flat))).astype(int)] if len(flat) else flat
        return {"shape": list(value.shape), "values": [float(f"{one:.7g}") for one in picked]}
    if isinstance(value, dict):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return value
