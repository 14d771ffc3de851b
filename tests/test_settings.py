"""Every option of training alone and beside every other one: obeyed, refused, or warned about."""

import itertools
import math
from collections.abc import Iterable
from dataclasses import MISSING, fields
from typing import Annotated, Any, get_type_hints

import pytest

from cn_clip import settings
from cn_clip.errors import ConfigError
from cn_clip.eval import extract_features, wise_ft
from cn_clip.features import extraction
from cn_clip.index import search
from cn_clip.index.options import AddOptions
from cn_clip.settings import Range
from cn_clip.training.params import RULES, Options

# A value for each option that is not its default. A new option needs one, and below what it says of others.
SAMPLES: dict[str, Any] = {
    "train_data": "lmdb/train",
    "val_data": "lmdb/valid",
    "num_workers": 2,
    "valid_num_workers": 2,
    "logs": "elsewhere",
    "name": "mine",
    "log_interval": 1,
    "report_training_batch_acc": True,
    "batch_size": 1,
    "valid_batch_size": 1,
    "max_steps": 9,
    "max_epochs": 3,
    "valid_step_interval": 50,
    "valid_epoch_interval": -1,
    "context_length": 24,
    "lr": 1e-5,
    "beta1": 0.8,
    "beta2": 0.9,
    "eps": 1e-7,
    "wd": 0.1,
    "warmup": 3,
    "use_bn_sync": True,
    "use_augment": True,
    "skip_scheduler": True,
    "save_epoch_frequency": -1,
    "save_step_frequency": 5,
    "resume": "a.pt",
    "reset_optimizer": True,
    "reset_data_offset": True,
    "precision": "fp16",
    "vision_model": "RN50",
    "mask_ratio": 0.999,
    "clip_weight_path": "clip.pt",
    "freeze_vision": True,
    "text_model": "RBT3-chinese",
    "bert_weight_path": "bert.bin",
    "grad_checkpointing": True,
    "use_flash_attention": True,
    "accum_freq": 4,
    "gather_with_grad": True,
    "skip_aggregate": True,
    "debug": True,
    "seed": 7,
    "distillation": True,
    "teacher_model_name": "ViT-L-14",
    "kd_loss_weight": 0.25,
    "device": "cpu",
    "num_threads": 2,
    "valid_precision": "fp32",
    "strict_fp32": True,
    "fsdp": True,
    "compile": True,
    "loss": "siglip",
    "multi_positive": True,
    "matryoshka": "64,128",
    "local_loss": True,
    "freeze_text": True,
    "freeze_text_layers": 2,
    "lora_rank": 8,
    "lora_alpha": 4.0,
    "save_adapters": True,
    "on_error": "skip",
    "decode": "reference",
    "keep_checkpoints": 2,
    "freeze_bn": True,
    "no_freeze_bn": True,
    "early_stop": 3,
    "report_to": "tensorboard",
    "init": "b.pt",
    "overwrite": True,
}
R, W = "refused", "warned"
# What an option gets that is given alone, and the other options that end it.
ALONE: dict[str, tuple[str, set[str]]] = {
    "batch_size": (R, {"accum_freq"}),
    "valid_batch_size": (W, set()),
    "valid_num_workers": (W, {"val_data"}),
    "valid_step_interval": (W, {"val_data"}),
    "valid_precision": (W, {"val_data"}),
    "strict_fp32": (R, {"valid_precision"}),
    "local_loss": (R, {"gather_with_grad"}),
    "use_bn_sync": (W, {"vision_model"}),
    "freeze_bn": (W, {"vision_model"}),
    "mask_ratio": (R, set()),
    "use_flash_attention": (W, set()),
    "distillation": (R, {"teacher_model_name"}),
    "teacher_model_name": (W, {"distillation"}),
    "kd_loss_weight": (W, {"distillation"}),
    "lora_alpha": (R, {"lora_rank"}),
    "save_adapters": (R, {"lora_rank"}),
    "early_stop": (R, {"val_data"}),
}
# What two options get that are at odds.
PAIRS: dict[frozenset[str], str] = {
    frozenset(pair): outcome
    for outcome, pairs in {
        R: [
            *(("init", other) for other in ("resume", "reset_optimizer", "reset_data_offset")),
            *(("init", other) for other in ("clip_weight_path", "bert_weight_path")),
            ("gather_with_grad", "skip_aggregate"),
            ("fsdp", "precision"),
            ("freeze_bn", "no_freeze_bn"),
            ("valid_precision", "precision"),
        ],
        W: [
            *(("resume", other) for other in ("clip_weight_path", "bert_weight_path")),
            ("freeze_text", "freeze_text_layers"),
            ("max_steps", "max_epochs"),
            ("val_data", "valid_epoch_interval"),
            ("vision_model", "mask_ratio"),
            ("vision_model", "grad_checkpointing"),
            ("keep_checkpoints", "save_epoch_frequency"),
        ],
    }.items()
    for pair in pairs
}
# Pairs where one option changes the answer to the other.
INSTEAD: dict[frozenset[str], str] = {
    frozenset(("mask_ratio", "vision_model")): W,  # a ResNet has no patches: nothing is left out
    frozenset(("valid_batch_size", "valid_epoch_interval")): W,
    frozenset(("gather_with_grad", "local_loss")): W,  # there is one process
    frozenset(("batch_size", "distillation")): R,  # the teacher is missing still
}


def outcome(*names: str) -> str:
    """What the rules say of these options beside the defaults of all others."""
    values = {one.name: one.default for one in fields(Options) if one.default is not MISSING}
    values |= {"train_data": "x", **{name: SAMPLES[name] for name in names}}
    found = broken(values)
    return R if any(rule.is_refused for rule in found) else W if found else "obeyed"


def broken(values: dict[str, Any]) -> list[settings.Rule]:
    """The rules broken by values that no Options could be made of."""
    options = object.__new__(Options)
    for name, value in values.items():
        object.__setattr__(options, name, value)
    return settings.broken(options, RULES)


def expected(names: Iterable[str]) -> str:
    given = set(names)
    if frozenset(given) in INSTEAD:
        return INSTEAD[frozenset(given)]
    found = {kind for name, (kind, ended_by) in ALONE.items() if name in given and not ended_by & given}
    found |= {PAIRS.get(frozenset(given), "obeyed")}
    return R if R in found else W if W in found else "obeyed"


def test_every_option_has_a_value_that_is_not_its_default() -> None:
    assert list(SAMPLES) == [one.name for one in fields(Options)]
    assert [one.name for one in fields(Options) if one.default == SAMPLES[one.name]] == []


def test_every_option_alone_is_obeyed_refused_or_warned_about() -> None:
    assert {name: outcome(name) for name in SAMPLES} == {name: expected([name]) for name in SAMPLES}


def test_every_pair_of_options_is_obeyed_refused_or_warned_about() -> None:
    wrong = {pair: outcome(*pair) for pair in itertools.combinations(SAMPLES, 2) if outcome(*pair) != expected(pair)}
    assert wrong == {}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(rule.names))
def test_a_rule_names_the_flags_it_is_about(rule: settings.Rule) -> None:
    known = {one.name for one in fields(Options)}
    assert set(rule.names) <= known
    missing = [name for name in rule.names if settings.flag(name) not in rule.message]
    assert missing == []


def test_every_number_has_bounds_that_hold_for_its_default_and_refuse_what_is_no_number() -> None:
    hints = get_type_hints(Options, include_extras=True)
    numbers = {one.name for one in fields(Options) if type(SAMPLES[one.name]) in (int, float)}
    bounds = {
        name: next((b for b in getattr(hints[name], "__metadata__", ()) if isinstance(b, Range)), None)
        for name in hints
    }
    assert {name for name, bound in bounds.items() if bound is not None} == numbers
    for one in fields(Options):
        bound = bounds[one.name]
        if bound is not None:
            assert one.default is None or one.default in bound, one.name
            for value in (math.nan, math.inf, -math.inf, -2 if one.name != "seed" else 2**63):
                with pytest.raises(ConfigError, match=f"^{settings.flag(one.name)}: expected "):
                    Options(train_data="x", **{one.name: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": -1.0}, "--lr: expected more than 0, got -1.0"),
        ({"lr": 0.0}, "--lr: expected more than 0, got 0.0"),
        ({"wd": -1.0}, "--wd: expected at least 0, got -1.0"),
        ({"mask_ratio": 1.0}, "--mask-ratio: expected a value in [0, 1), got 1.0"),
        (
            {"mask_ratio": 0.999},
            "--mask-ratio: leaves no patch of a picture of this --vision-model; choose a smaller one",
        ),
        ({"context_length": 513}, "--context-length: expected 3 to 512, got 513"),
        ({"num_threads": 0}, "--num-threads: expected at least 1, got 0"),
        ({"lora_alpha": 8.0}, "--lora-alpha: needs --lora-rank"),
        ({"early_stop": 3}, "--early-stop: needs --val-data"),
        ({"name": ""}, "--name: expected the name of a folder in --logs"),
        (
            {"early_stop": 3, "val_data": "v", "valid_epoch_interval": -1},
            "--early-stop: needs validation; --valid-step-interval and --valid-epoch-interval ask for none",
        ),
        (
            {"lora_rank": 8, "freeze_vision": True, "freeze_text": True},
            "--lora-rank with --freeze-vision and --freeze-text: both towers are frozen, there is nothing to adapt; "
            "leave one to be trained",
        ),
    ],
)
def test_what_cannot_be_obeyed_is_refused_in_one_sentence(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Options(train_data="x", **values)
    assert str(refused.value) == message


def test_a_batch_of_one_pair_is_refused_unless_it_is_joined_with_others(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = {"train_data": "x", "batch_size": 1}
    with pytest.raises(ConfigError, match="--batch-size 1: a pair is learned by telling it from others"):
        Options(**alone)
    assert Options(**alone, accum_freq=2).num_contrasted == 2
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert Options(**alone).num_contrasted == 4
    with pytest.raises(ConfigError, match="--skip-aggregate"):
        Options(**alone, skip_aggregate=True)
    taught = Options(**alone, skip_aggregate=True, distillation=True, teacher_model_name="ViT-L-14")
    (rule,) = settings.broken(taught, RULES)
    assert not rule.is_refused


@pytest.mark.parametrize(
    ("bounds", "words", "inside", "outside"),
    [
        (Range(least=1), "at least 1", [1, 5], [0]),
        (Range(least=3, most=512), "3 to 512", [3, 512], [2, 513]),
        (Range(least=0, below=1), "a value in [0, 1)", [0, 0.5], [1, -0.1]),
        (Range(above=0), "more than 0", [1e-30], [0, -1]),
        (Range(most=4), "at most 4", [4, -9], [5]),
    ],
)
def test_bounds_say_what_they_hold(bounds: Range, words: str, inside: list[float], outside: list[float]) -> None:
    assert str(bounds) == words
    assert all(value in bounds for value in inside)
    assert not any(value in bounds for value in [*outside, math.nan, math.inf])


@pytest.mark.parametrize(
    ("options", "values", "message"),
    [
        (AddOptions, {"image_column": "file"}, "--image-column: needs --metadata, the table that has it"),
        (AddOptions, {"metadata": "a.csv", "image_column": "file"}, None),
        (wise_ft.Options, {"alpha": 0.5, "output": "o.pt", "alphas": "0,1"}, "--alphas: needs --val-data"),
        (wise_ft.Options, {"alpha": 0.5, "output": "o.pt", "num_workers": 1}, "--num-workers: needs --val-data"),
        (wise_ft.Options, {"alphas": "0,1", "val_data": "v"}, None),
        (
            search.Options,
            {"index": "i", "text": "猫", "text_weight": 0.9},
            "--text-weight: needs TEXT and a picture (--image or --id) to weigh it against",
        ),
        (search.Options, {"index": "i", "text": "猫", "id": "7", "text_weight": 0.9}, None),
    ],
)
def test_other_commands_refuse_what_they_would_ignore(
    options: Any, values: dict[str, Any], message: str | None
) -> None:
    given = {"zeroshot": "a.pt", "finetuned": "b.pt", **values} if options is wise_ft.Options else values
    if message is None:
        options(**given)
        return
    with pytest.raises(ConfigError) as refused:
        options(**given)
    assert str(refused.value) == message


@pytest.mark.parametrize(("asked", "given"), [("text", "image"), ("image", "text")])
def test_an_output_for_features_that_are_not_extracted_is_warned_of(
    asked: str, given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = extract_features.Options(
        model="a.pt", **{f"extract_{asked}_feats": True, f"{given}_feat_output_path": "out.jsonl"}
    )
    extraction.begin(options)
    expected = f"--{given}-feat-output-path: changes nothing without --extract-{given}-feats"
    assert expected in capsys.readouterr().err


def test_none_is_in_any_range() -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Some:
        count: Annotated[int | None, Range(least=1)] = None

    settings.check(Some())
    with pytest.raises(ConfigError, match="--count: expected at least 1, got 0"):
        settings.check(Some(0))
