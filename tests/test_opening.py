"""How commands name a model: one declaration of the options, one value they become, one place that opens it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cn_clip.clip import opening
from cn_clip.clip.backends.base import Facts
from cn_clip.clip.backends.names import KINDS
from cn_clip.clip.choice import DEFAULT_MODEL, CheckpointSettings, Choice, ModelSettings, check
from cn_clip.clip.families.opening import full_name
from cn_clip.clip.opening import (
    fingerprint,
    identity,
    open_encoder,
    open_quietly,
    weight_files,
    weights_digest,
)
from cn_clip.command import Speaker, parse
from cn_clip.errors import ConfigError
from cn_clip.eval import evaluate, extract_features, linear_probe, zeroshot_evaluation
from cn_clip.index import add, build, search
from cn_clip.serve import main as serve

# Command -> what it needs besides a model.
COMMANDS: dict[Any, list[str]] = {
    extract_features.Options: ["--extract-text-feats"],
    zeroshot_evaluation.Options: ["--datapath", "d", "--label-file", "l"],
    evaluate.Options: ["muge", "--data", "d"],
    linear_probe.Options: ["--train", "a", "--test", "b"],
    build.Options: ["pictures", "--output", "i"],
    add.Options: ["i", "pictures"],
    search.Options: ["i", "猫"],
    serve.Options: [],
}
QUIET = Speaker(quiet=True)


@pytest.mark.parametrize("options", COMMANDS, ids=lambda one: one.__module__)
def test_every_command_makes_the_same_choice_of_the_same_flags(options: type[ModelSettings]) -> None:
    asked = ["--model", "Emoji-Tiny", "--backend", "onnx", "--precision", "fp32", "--device", "cpu"]
    asked += ["--num-threads", "2", "--download-root", "models"]
    chosen = parse(options, [*COMMANDS[options], *asked]).chosen
    # Of an index, the pictures are decoded as it says, where nothing else is asked for.
    decode = None if options in (build.Options, add.Options, search.Options, serve.Options) else "exact"
    assert chosen == Choice("Emoji-Tiny", None, None, "onnx", "fp32", "cpu", 2, "models", decode=decode)


def test_amp_is_float32_and_the_usual_model_is_taken_where_none_is_named() -> None:
    assert ModelSettings(precision="amp").chosen == Choice(DEFAULT_MODEL)
    with pytest.raises(ConfigError, match="--resume: expected a checkpoint file"):
        CheckpointSettings().chosen  # noqa: B018 - raises


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        (Choice("m", precision="int8"), "--precision: the torch backend computes in fp32 or bf16 or fp16 or auto"),
        (Choice("m", backend="tensorrt", num_threads=1), "--num-threads: the tensorrt backend computes on the GPU"),
        (Choice("hf:m", backend="tensorrt"), "--backend: hf:m runs in torch or onnx or openvino, got 'tensorrt'"),
        (Choice("hf:m", vision="RN50"), "hf:m: is of another family and says itself what its towers are"),
        (Choice("hf:"), "--model 'hf:': expected hf:FOLDER, open_clip:ARCHITECTURE@FILE, "),
    ],
)
def test_a_model_that_could_not_be_opened_is_refused_before_any_work(chosen: Choice, told: str) -> None:
    with pytest.raises(ConfigError) as one:
        check(chosen)
    assert str(one.value).startswith(told)


def test_what_is_opened_says_where_it_comes_from(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = Choice("Emoji-Tiny", device="cpu", context_length=24)
    encoder = open_encoder(chosen, Speaker(quiet=False))
    assert capsys.readouterr().out.splitlines()[-1].startswith("=> loaded checkpoint 'Emoji-Tiny' (epoch ")
    assert (encoder.facts.device, encoder.facts.precision, encoder.facts.max_length) == ("cpu", "fp32", 512)
    assert encoder.facts.num_parameters[0] > encoder.facts.num_parameters[1] > 0
    for kind in KINDS:
        found: Any = identity(chosen, encoder)(kind)
        assert [path for path, _, _ in found["model"]] == [str(weight_files(chosen)[0].resolve())]
    with pytest.raises(ConfigError, match="--context-length 600: Emoji-Tiny takes texts of at most 512 tokens"):
        open_quietly(Choice("Emoji-Tiny", device="cpu", context_length=600), QUIET)


def test_a_fingerprint_is_of_the_weights_whatever_they_are_computed_in() -> None:
    digits = set()
    for precision in ("fp32", "bf16"):
        chosen = Choice("Emoji-Tiny", device="cpu", precision=precision)
        digits.add(fingerprint(chosen, open_quietly(chosen, QUIET, with_fingerprint=True)))
    assert digits == {"dd8b50067459b177"}


def test_models_without_files_here_are_told_apart_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening.families, "files_of", lambda *_, **__: [])  # as of the tags of open_clip
    encoder: Any = SimpleNamespace(facts=Facts(), backend=None, cut=None)
    chosen = [Choice(f"open_clip:ViT-B-32@{tag}") for tag in ("openai", "laion2b_s34b_b79k")]
    for of in (lambda one: fingerprint(one, encoder), weights_digest):
        first, other = map(of, chosen)
        assert first != other
        assert first == of(chosen[0])


def test_a_published_name_stays_and_a_path_is_from_the_root_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    names = [full_name(one) for one in ("ViT-B-16", "x.pt", "hf:folder", "hf:OWNER/NAME")]
    assert names == ["ViT-B-16", f"{tmp_path}/x.pt", f"hf:{tmp_path}/folder", "hf:OWNER/NAME"]
