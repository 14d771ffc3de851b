"""Every name of cn_clip 1.6.0 (golden/names.json) is here and takes what it takes, or differences.md says why not."""

import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cn_clip import command, drop_in
from cn_clip.errors import ConfigError

ROOT = Path(__file__).parents[1]
SURFACE: dict[str, dict[str, dict[str, Any]]] = json.loads((ROOT / "tests" / "golden" / "names.json").read_text())
# What `parse_args` of each command takes. `training.main` hands on that of `training.params`.
PARSERS = {module: names["parse_args"]["options"] for module, names in SURFACE.items() if "options" in str(names)}
ROOMS = ("clip", "deploy", "eval", "preprocess", "training")


def room(module: str, name: str) -> str:
    """Where the name comes from: a fault of a name that is handed on is a fault of its home."""
    handed_on = drop_in.home_of(module, name) or module
    return SURFACE[module][name].get("from", handed_on).split(".")[1]


def listed() -> set[str]:
    """The names of the section of differences.md on names, `module.name` in the first column of its table."""
    text = (ROOT / "docs" / "differences.md").read_text(encoding="utf-8")
    section = re.search(r"^## 名字\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section is not None
    rows = [line.split("|")[1] for line in section[1].splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([\w.]+)`", row)}


# --- what of a name is not as recorded


def faults(module: str, name: str) -> list[str]:
    try:
        value = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        return [str(error)]
    entry = SURFACE[module][name]
    if "from" in entry:
        return faults(entry["from"], name)
    if "function" in entry:
        return call_faults(name, value, entry["function"])
    return list(class_faults(value, entry) if "class" in entry else constant_faults(value, entry))


def class_faults(value: Any, entry: dict[str, Any]) -> Iterator[str]:
    if not isinstance(value, type):
        yield f"a {type(value).__name__}, expected a class"
        return
    for method, recorded in entry["class"].items():
        found = getattr(value, method, None)
        yield from call_faults(method, found, recorded)
    fields = [*getattr(value, "__dataclass_fields__", ())]
    if fields != entry.get("fields", fields):
        yield f"fields {fields}, expected {entry['fields']}"


def constant_faults(value: Any, entry: dict[str, Any]) -> Iterator[str]:
    if entry["constant"] != type(value).__name__:
        yield f"a {type(value).__name__}, expected a {entry['constant']}"
        return
    if missing := [key for key in entry.get("keys", ()) if key not in map(str, value)]:
        yield f"no {missing}"
    if "length" in entry and len(value) != entry["length"]:
        yield f"{len(value)} items, expected {entry['length']}"
    if entry.get("items") == ["function"] and not all("猫" in item("猫") for item in value):
        yield "expected functions from a label to a text"


def call_faults(name: str, function: Any, recorded: list[list[Any]]) -> list[str]:
    """Why a call that is valid for the recorded parameters might not be for `function`."""
    if not callable(function):
        return [f"{name}: {function!r}, expected a function"]
    try:
        own = list(inspect.signature(function).parameters.values())
    except ValueError as error:  # some that are written in C do not say
        return [f"{name}: {error}"]
    variable = {one.kind.name for one in own} & {"VAR_POSITIONAL", "VAR_KEYWORD"}
    positional = [one for one in own if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    found = []
    for place, (parameter, kind, *default) in enumerate(recorded):
        if kind.startswith("VAR_"):
            found += [] if kind in variable else [f"{name}: no *{parameter}"]
        elif place >= len(positional):
            found += [] if len(variable) == 2 else [f"{name}: no argument {parameter} at position {place}"]
        elif positional[place].name != parameter and parameter != "self":
            found.append(f"{name}: argument {place} is {positional[place].name}, expected {parameter}")
        elif default and not is_default(positional[place].default, default[0]):
            found.append(
                f"{name}: the default of {parameter} is {positional[place].default!r}, expected {default[0]!r}"
            )
    wanted = [one for one in own if one.default is one.empty and one.kind.name not in variable]
    more = [one.name for one in wanted if one.name not in [parameter for parameter, *_ in recorded]]
    return found + [f"{name}: wants {one} too" for one in more if not found]


def is_default(own: object, recorded: object) -> bool:
    """None stands for a default that depends on the machine, such as the device, and is chosen in the call."""
    own = list(own) if isinstance(own, tuple) else own
    return own is not inspect.Parameter.empty and (own is None or isinstance(recorded, dict) or own == recorded)


@pytest.mark.parametrize("where", ROOMS)
def test_names_are_as_recorded_or_listed_as_different(where: str) -> None:
    names = [(module, name) for module, entries in SURFACE.items() for name in entries if room(module, name) == where]
    found = {f"{module.removeprefix('cn_clip.')}.{name}": faults(module, name) for module, name in names}
    different = {name: reasons for name, reasons in found.items() if reasons}
    assert not {name: reasons for name, reasons in different.items() if name not in listed()}
    assert not listed() & (found.keys() - different.keys()), "listed as different, but as recorded"


def test_how_many_names_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    names = [(module, name) for module, entries in SURFACE.items() for name in entries]
    equal = [one for one in names if not faults(*one)]
    with capsys.disabled():
        print(
            f"\n{len(names)} names of cn_clip 1.6.0: {len(equal)} equal, {len(names) - len(equal)} listed as different"
        )
    assert len(names) == 244


def test_faults_are_found() -> None:
    recorded = [["a", "POSITIONAL_OR_KEYWORD"], ["b", "POSITIONAL_OR_KEYWORD", 2]]
    assert call_faults("f", lambda a, b=2, c=3: None, recorded) == []
    assert call_faults("f", lambda *args, **more: None, recorded) == []
    assert call_faults("f", lambda b, a: None, recorded) == [
        "f: argument 0 is b, expected a",
        "f: argument 1 is a, expected b",
    ]
    assert call_faults("f", lambda a, b=3: None, recorded) == ["f: the default of b is 3, expected 2"]
    assert call_faults("f", lambda a, b=2, *, c: None, recorded) == ["f: wants c too"]
    assert call_faults("f", lambda a: None, recorded) == ["f: no argument b at position 1"]
    assert call_faults("f", None, recorded) == ["f: None, expected a function"]


# --- the options of the commands


def given(module: str, monkeypatch: pytest.MonkeyPatch, *args: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["program", *args])
    return vars(importlib.import_module(module).parse_args())


def required(module: str) -> list[str]:
    """The fewest arguments that the command takes."""
    words = []
    for flag, option in PARSERS[module].items():
        if option["required"]:
            words += [flag, option["choices"][0] if option["choices"] else "x"]
    return words


@pytest.mark.parametrize("module", PARSERS)
def test_parse_args_gives_the_recorded_defaults(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = given(module, monkeypatch, *required(module))
    recorded = {one["dest"]: one["default"] for one in PARSERS[module].values() if not one["required"]}
    if module == "cn_clip.training.params":  # these are chosen by the picture tower
        recorded |= {"lr": 5.0e-4, "beta1": 0.9, "beta2": 0.98, "eps": 1.0e-6, "aggregate": True}
    assert {name: parsed[name] for name in recorded} == recorded


@pytest.mark.parametrize("module", PARSERS)
def test_parse_args_takes_every_recorded_option(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for flag, option in PARSERS[module].items():
        others = [word for pair in pairs(required(module)) if pair[0] != flag for word in pair]
        if option["type"] == "flag":
            assert given(module, monkeypatch, *others, flag)[option["dest"]] is True
            continue
        text, value = {"int": ("7", 7), "float": ("0.5", 0.5), "str": ("x", "x")}[option["type"]]
        for choice in option["choices"] or [text]:
            expected = choice if option["choices"] else value
            assert given(module, monkeypatch, *others, flag, choice)[option["dest"]] == expected


def pairs(words: list[str]) -> list[tuple[str, str]]:
    return list(zip(words[::2], words[1::2], strict=True))


@pytest.mark.parametrize("module", [module for module in PARSERS if required(module)])
def test_parse_args_stops_without_a_required_option(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for left_out, _ in pairs(required(module)):
        rest = [word for pair in pairs(required(module)) if pair[0] != left_out for word in pair]
        with pytest.raises(SystemExit) as stopped:
            given(module, monkeypatch, *rest)
        assert stopped.value.code == 2


def prefixes(flags: list[str]) -> dict[str, str]:
    """Every shortened spelling that means one of the flags alone, as argparse has it -> the flag."""
    every = {flag[:length] for flag in flags for length in range(3, len(flag))} - set(flags)
    meant = {short: [flag for flag in flags if flag.startswith(short)] for short in every}
    return {short: candidates[0] for short, candidates in meant.items() if len(candidates) == 1}


@pytest.mark.parametrize("module", PARSERS)
def test_shortened_options_mean_what_argparse_takes_them_for(module: str) -> None:
    options = importlib.import_module(module).Options
    recorded = prefixes([*PARSERS[module], "--help"])
    found = {short: command.spelled_out(options, [short])[0] for short in recorded}
    first = command.spellings(options)
    meant = {short: flag.replace("_", "-") for short, flag in recorded.items()}
    assert found == {short: first.get(flag, flag) for short, flag in meant.items()}


def test_shortened_options_keep_their_value_and_what_follows_two_dashes() -> None:
    from cn_clip.training.params import Options

    words = ["--vision=ViT-B-16", "--text", "x", "--kd_loss", "1", "--lr", "1", "--", "--vision"]
    assert command.spelled_out(Options, words) == [
        *("--vision-model=ViT-B-16", "--text-model", "x", "--kd-loss-weight", "1", "--lr", "1", "--", "--vision"),
    ]


def test_an_option_that_fits_two_is_refused_with_both(capsys: pytest.CaptureFixture[str]) -> None:
    from cn_clip.training.params import Options

    with pytest.raises(ConfigError, match="--valid-: fits --valid-batch-size, --valid-epoch-interval"):
        command.spelled_out(Options, ["--valid-", "3"])
    with pytest.raises(SystemExit) as stopped:
        command.parse(Options, ["--train-data", "x", "--valid", "3"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
