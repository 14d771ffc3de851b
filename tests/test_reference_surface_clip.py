"""Public uses of `cn_clip.clip` return what they return with the reference (cn_clip 1.6.0)."""

import gzip
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import reference_uses as uses
import torch
from PIL import Image
from reference_uses import small

import cn_clip.clip as clip
from cn_clip.clip.bert import BertIntermediate
from cn_clip.clip.layers import QuickGELU
from cn_clip.clip.model import CLIP
from cn_clip.clip.visual import VisualTransformer
from cn_clip.errors import ConfigError

GOLDEN = json.loads(gzip.decompress((Path(__file__).parent / "golden" / "uses.json.gz").read_bytes()))


def compare(ours: Any, theirs: Any, place: str) -> None:
    if isinstance(theirs, dict):
        assert isinstance(ours, dict), place
        assert sorted(ours) == sorted(theirs), place
        for name in theirs:
            compare(ours[name], theirs[name], f"{place}.{name}")
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), place
        for number, value in enumerate(theirs):
            compare(ours[number], value, f"{place}[{number}]")
    elif isinstance(theirs, float):
        # The values are of the order of 1; sums are taken in another order.
        assert ours == pytest.approx(theirs, abs=2e-5, rel=1e-5), place
    else:
        assert ours == theirs, place


@pytest.mark.parametrize("name", [name for name in uses.USES if name != "signatures"])
def test_a_public_use_returns_what_it_returns_with_the_reference(name: str) -> None:
    compare(uses.plain(uses.USES[name]()), GOLDEN[name], name)


def test_functions_and_methods_take_the_arguments_of_the_reference() -> None:
    for name, theirs in GOLDEN["signatures"]["signatures"].items():
        module, _, path = name.partition(":")
        found = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
        ours = uses.arguments(found)
        assert ours[: len(theirs)] == theirs, name
        assert all("=" in more for more in ours[len(theirs) :]), name  # what is added may be left out


def test_names_of_the_reference_lead_to_one_thing_each() -> None:
    from cn_clip.clip import bert_tokenizer, model, modeling_bert, utils

    assert clip.FullTokenizer is bert_tokenizer.FullTokenizer
    assert utils._tokenizer is model._tokenizer is clip._tokenizer
    assert utils.restore_model is model.restore_model
    assert utils.CLIP is model.CLIP
    assert modeling_bert.BertModel is model.BertModel
    assert isinstance(small().bert.encoder.layer[0].output, modeling_bert.BertOutput)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        model.nothing  # noqa: B018


def test_settings_and_tokenizer_are_imported_without_pytorch() -> None:
    code = (
        "import sys; from cn_clip.clip import FullTokenizer, configuration_bert, bert_tokenizer, _tokenizer;"
        "configuration_bert.BertConfig(7); _tokenizer.tokenize('皮卡丘'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- shortcuts --------------------------------------------------------------------------------------------------------


def suffices(whole: CLIP) -> tuple[bool, bool]:
    assert isinstance(whole.visual, VisualTransformer)
    return whole.visual.transformer.class_token_suffices(), whole.bert.class_token_suffices()


@pytest.mark.parametrize(
    "part", ["visual.transformer", "visual.transformer.resblocks", "visual.transformer.resblocks.2"]
)
@pytest.mark.parametrize("inner", ["", ".attn", ".attn.out_proj", ".mlp.gelu", ".ln_2"])
def test_a_hook_ends_the_shortcut_of_the_picture_tower_while_it_stays(part: str, inner: str) -> None:
    whole = small()
    if inner and not part.endswith("2"):
        return
    before = whole.encode_image(uses.pixels())
    assert suffices(whole) == (True, True)
    for name in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        hook = getattr(whole.get_submodule(part + inner), name)(lambda *_: None)
        assert suffices(whole) == (False, True)
        torch.testing.assert_close(whole.encode_image(uses.pixels()), before)
        hook.remove()
        assert suffices(whole) == (True, True)


@pytest.mark.parametrize(
    "part", ["", "encoder", "encoder.layer.2", "encoder.layer.2.attention.self.key", "encoder.layer.2.output.LayerNorm"]
)
def test_a_hook_ends_the_shortcut_of_the_text_tower_while_it_stays(part: str) -> None:
    whole = small()
    hook = whole.bert.get_submodule(part).register_forward_hook(lambda *_: None)
    assert suffices(whole) == (True, False)
    hook.remove()
    assert suffices(whole) == (True, True)
    whole.bert.encoder.output_attentions = True
    assert suffices(whole) == (True, False)


def test_a_hook_for_all_modules_ends_both_shortcuts() -> None:
    whole = small()
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert suffices(whole) == (False, False)
    finally:
        hook.remove()
    assert suffices(whole) == (True, True)


def test_without_onlookers_the_last_layers_compute_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    monkeypatch.setattr(QuickGELU, "forward", lambda _, x: rows.append(x.shape[1]) or x * torch.sigmoid(1.702 * x))
    monkeypatch.setattr(BertIntermediate, "forward", lambda self, x: rows.append(x.shape[1]) or self.dense(x))
    whole = small()
    whole.encode_image(uses.pixels())
    whole.encode_text(uses.TOKENS)
    assert rows == [17, 17, 1, 6, 6, 1]


def test_hooks_of_fsdp_do_not_end_the_shortcut() -> None:
    whole = small()

    def gather(*_: object) -> None: ...

    gather.__module__ = "torch.distributed.fsdp._fully_shard._fsdp_state"
    whole.visual.transformer.resblocks[2].register_forward_pre_hook(gather)
    whole.bert.encoder.layer[2].register_forward_hook(gather)
    assert suffices(whole) == (True, True)


@pytest.mark.parametrize("watched", [False, True])
def test_the_picture_tower_compiles_into_one_graph(watched: bool) -> None:
    torch.compiler.reset()  # or the graph of another test would be taken, in which nobody looks on
    whole, shapes = small(), []
    if watched:
        layer = whole.visual.transformer.resblocks[2].ln_1
        layer.register_forward_hook(lambda _, inputs, output: shapes.append(tuple(output.shape)))
    before = whole.visual(uses.pixels())
    whole.visual = torch.compile(whole.visual, fullgraph=True, backend="eager")
    torch.testing.assert_close(whole.encode_image(uses.pixels()), before)
    assert shapes == [(17, 2, 64)] * 2 * watched


def test_adapters_of_peft_go_on_the_parts_by_their_names() -> None:
    peft = pytest.importorskip("peft")
    whole = small()
    before = whole(uses.pixels(), uses.TOKENS)
    settings = peft.LoraConfig(r=2, target_modules=["query", "value", "c_fc", "c_proj"])
    adapted = peft.get_peft_model(whole, settings)
    for ours, theirs in zip(adapted(uses.pixels(), uses.TOKENS), before, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert suffices(whole) == (True, True)
    (adapted(uses.pixels(), uses.TOKENS)[0] - 1).square().sum().backward()
    assert all(p.grad is not None for name, p in whole.visual.named_parameters() if "lora_B" in name)


def test_changed_steps_are_obeyed_and_refused_where_they_cannot_be() -> None:
    preprocess = clip.image_transform(8)
    picture = Image.new("RGB", (20, 10), (255, 0, 0))
    preprocess.transforms[0].size = (4, 6)
    assert preprocess(picture).shape == (3, 4, 6)
    with pytest.raises(ConfigError, match="the steps were changed"):
        preprocess.array(picture)
    preprocess.transforms[0].size = (8, 8)
    assert preprocess.array(picture).shape == (3, 8, 8)
    black_and_white = preprocess.transforms[2](Image.new("1", (2, 3), 1))
    assert torch.equal(black_and_white, torch.ones(1, 3, 2))
