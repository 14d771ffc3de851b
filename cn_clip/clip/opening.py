"""From the model named on the command line to an `Encoder`, and the identity of a model.

Every command that opens a model by its name, file or folder does so here.
"""

import glob
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from cn_clip import ranks, zoo
from cn_clip.clip import marks
from cn_clip.clip.backends import choosing
from cn_clip.clip.backends.base import Backend, ExportedBackend, facts_of
from cn_clip.clip.backends.choosing import Decision
from cn_clip.clip.backends.names import KINDS, Kind, Precision, settled, torch_precisions
from cn_clip.clip.backends.onnx_files import extra_path
from cn_clip.clip.backends.opening import open_backend, settle_precision
from cn_clip.clip.choice import Choice
from cn_clip.clip.encoder import Encoder
from cn_clip.clip.families import folders
from cn_clip.clip.families import opening as families
from cn_clip.clip.weights import hub
from cn_clip.command import Speaker
from cn_clip.digests import add_file
from cn_clip.errors import ConfigError
from cn_clip.language import both

# What decides on the rows a tower gives, besides its inputs: values that JSON can hold.
Identity: TypeAlias = Callable[[Kind], Mapping[str, object]]


def open_encoder(chosen: Choice, say: Speaker, *, kinds: Sequence[Kind] = KINDS) -> Encoder:
    """The encoder asked for, of exported models only the towers wanted; `say` prints what Chinese-CLIP prints.

    Raises CnClipError: no such model, device or precision, texts longer than it takes, a package that is missing.
    """
    chosen, decision = _settled(chosen, say, kinds)
    if chosen.precision == "auto":
        chosen = replace(chosen, precision=precision_of(chosen))
        say(_told(chosen))
    for kind, name in (("vision", chosen.vision), ("text", chosen.text)):
        if name:
            say(f"Loading {kind} model config from {zoo.config_path(name)}")
    if chosen.backend == "torch":
        say(f"Begin to load model checkpoint from {chosen.model}.")
    encoder = open_quietly(chosen, say, kinds=kinds)
    encoder.decision = decision
    if chosen.is_foreign:
        say(f"=> opened '{chosen.model}' (texts of at most {encoder.context_length} tokens)")
    elif chosen.backend == "torch":
        facts = encoder.facts
        say(f"=> loaded checkpoint '{chosen.model}' (epoch {facts.epoch} @ {facts.step} steps)")
        if facts.precision == "fp32" and (on_gpu := float32_on_gpu(chosen)):
            say(on_gpu)
    else:
        say(f"=> opened '{chosen.model}' ({chosen.backend}, {chosen.precision})")
    return encoder


def _told(chosen: Choice) -> str:
    return both("精度：", "precision: ") + f"auto -> {chosen.precision}"


def _settled(chosen: Choice, say: Speaker, kinds: Sequence[Kind]) -> tuple[Choice, Decision | None]:
    """The choice with what backend "auto" takes, which `say` tells; raises as `choosing.decide`."""
    if chosen.backend != "auto":
        return chosen, None
    if chosen.is_foreign:
        settings = {name: value for name, value in _settings(chosen).items() if name not in _OF_CHINESE_CLIP}
        decision = families.decide(chosen.model, **settings, min_cosine=chosen.min_cosine, say=say.note)
    else:
        settings = _settings(chosen)
        decision = choosing.decide(chosen.model, **settings, kinds=kinds, min_cosine=chosen.min_cosine, say=say.note)
    say.note(str(decision))
    say.add(auto=decision.values())
    return replace(chosen, backend=decision.backend, precision=decision.precision, min_cosine=None), decision


_OF_CHINESE_CLIP = ("vision", "text", "merge_tokens")


def _settings(chosen: Choice) -> dict[str, Any]:
    """What every backend is opened with."""
    return {
        "precision": chosen.precision,
        "device": chosen.device,
        "vision": chosen.vision,
        "text": chosen.text,
        "download_root": chosen.download_root,
        "num_threads": chosen.num_threads,
        "merge_tokens": chosen.merge_tokens or 0,
    }


def open_quietly(
    chosen: Choice, say: Speaker, *, kinds: Sequence[Kind] = KINDS, with_fingerprint: bool = False
) -> Encoder:
    """The same; `say` notes only what takes long, or was chosen here.

    with_fingerprint: it is opened so that `fingerprint` can tell its weights from others. PyTorch then reads them once
    more, and of files that do not say it both towers are opened.
    """
    if chosen.backend == "auto":
        chosen, decision = _settled(chosen, say, kinds)
        encoder = open_quietly(chosen, say, kinds=kinds, with_fingerprint=with_fingerprint)
        encoder.decision = decision
        return encoder
    named = chosen.backend
    if chosen.precision == "auto":
        chosen = replace(chosen, precision=precision_of(chosen))
        say.note(_told(chosen))
    if chosen.backend == "torch":
        ranks.set_float32_products(ranks.choose_device(chosen.device), is_strict=chosen.strict_fp32)
    if chosen.is_foreign:
        return Encoder(
            chosen.model,
            backend=chosen.backend,
            precision=chosen.precision,
            device=chosen.device,
            context_length=chosen.context_length,
            download_root=chosen.download_root,
            num_threads=chosen.num_threads,
            decode=chosen.decode or "exact",
            upright=chosen.upright,
            trust_remote_code=chosen.trust_remote_code,
            dimensions=chosen.dimensions,
        )
    settings = _settings(chosen)
    if chosen.backend == "torch":
        from cn_clip.clip.backends.pytorch import open_torch

        backend: Backend = open_torch(chosen.model, **settings, with_fingerprint=with_fingerprint)
    else:
        backend = open_backend(chosen.model, backend=named, **settings, kinds=kinds, say=say.note)
        if with_fingerprint and facts_of(backend).weights is None and set(kinds) != set(KINDS):
            return open_quietly(chosen, say)
    if "text" in kinds:
        check_context_length(backend, chosen.context_length, chosen.model)
    return Encoder(
        backend,
        context_length=chosen.context_length,
        decode=chosen.decode or "exact",
        upright=chosen.upright,
        dimensions=chosen.dimensions,
    )


def precision_of(chosen: Choice) -> Precision:
    """What is computed in, "auto" being the fastest here; raises ConfigError for one that this machine lacks.

    Of a named backend: what backend "auto" takes is known when the model is open.
    """
    assert chosen.backend != "auto", "is settled before"
    try:
        return settle_precision(chosen.backend, chosen.precision, chosen.device)
    except ConfigError as error:
        raise ConfigError(f"--{error}") from error


def float32_on_gpu(chosen: Choice) -> str | None:
    """What float32 is on the GPU chosen, and what "auto" would bring there; None elsewhere.

    The speed is estimated by peak rates: TF32 multiplies half as fast as bfloat16, and moves twice the bytes.
    """
    device = ranks.choose_device(chosen.device)
    if device.type != "cuda":
        return None
    if chosen.strict_fp32:
        return both("精度：fp32 (--strict-fp32)", "precision: fp32 (--strict-fp32)")
    is_tf32 = ranks.computes_in_tf32(device, is_strict=False)
    faster = settled("torch", "auto", torch_precisions(device))
    chinese, english = ("至多一倍", "at most 2 times") if is_tf32 else ("几倍", "several times")
    cosine = "0.9998" if faster == "bf16" else "0.999"
    now = "fp32 (TF32)" if is_tf32 else "fp32"
    return both(
        f"精度：{now}；--precision auto 会用 {faster}：按 GPU 的峰值估计快{chinese}，与 fp32 的余弦约 {cosine}",
        f"precision: {now}; --precision auto would use {faster}: {english} as fast, estimated from peak rates, "
        f"with a cosine of about {cosine} to fp32",
    )


def check_context_length(backend: Backend, context_length: int, model: str = "") -> None:
    """Raises ConfigError when the text tower takes only shorter texts, before any is computed.

    model: for messages, where the tower has no file of its own.
    """
    longest = facts_of(backend).max_length
    if longest is not None and context_length > longest:
        path = backend.text.path if isinstance(backend, ExportedBackend) and backend.text else model
        raise ConfigError(
            f"--context-length {context_length}: {path} takes texts of at most {longest} tokens; "
            f"use --context-length {longest}"
        )


# --- the identity of a model: when its rows are those of another run


def identity(chosen: Choice, encoder: Encoder) -> Identity:
    """On this machine, at once: the files by path, size and time, and the settings."""
    settings: dict[str, object] = {
        "backend": encoder.backend_name if chosen.backend == "auto" else chosen.backend,
        "precision": encoder.facts.precision if chosen.backend == "auto" else precision_of(chosen),
        "num_threads": chosen.num_threads,
        "vision_model": chosen.vision,
        "text_model": chosen.text,
    }
    if encoder.facts.merge_tokens:  # only where there is any: runs of versions without it go on
        settings["merge_tokens"] = encoder.facts.merge_tokens
    if encoder.cut:
        settings["dimensions"] = encoder.cut
    if isinstance(encoder.backend, ExportedBackend):
        of_towers = tower_identity(encoder.backend)
        return lambda kind: {**settings, **of_towers(kind)}
    if chosen.is_foreign:
        settings["name"] = chosen.model
    facts = {**settings, "model": _states(weight_files(chosen)), "device": encoder.facts.device}
    if settings["precision"] == "fp32" and str(encoder.facts.device).startswith("cuda"):
        facts["strict_fp32"] = chosen.strict_fp32
    return lambda _: facts


def tower_identity(backend: ExportedBackend) -> Identity:
    """The files of the towers, and where they are computed."""

    def of(kind: Kind) -> Mapping[str, object]:
        tower = backend.image if kind == "image" else backend.text
        assert tower is not None, "the towers wanted are open"
        path = Path(tower.path)
        return {"model": _states([path, extra_path(path)]), "device": tower.provider}

    return of


def fingerprint(chosen: Choice, encoder: Encoder) -> str:
    """Of the weights, alike for every backend and precision; else of the bytes of the files that were opened.

    Of a model without files here, such as a tag of open_clip, it is of the name. A model that merges tokens, or whose
    vectors are cut, gives other vectors: `marks` says how its fingerprint ends.
    encoder: from `open_quietly` with_fingerprint.
    """
    # A text tower that is open alone does not know what the picture tower beside it merges.
    made: dict[str, Any] = {
        "merge_tokens": encoder.facts.merge_tokens or chosen.merge_tokens or 0,
        "dimensions": encoder.cut,
    }
    if chosen.is_foreign:  # alike for every backend: the files that were exported, not what they became
        return marks.marked(f"file:{_digest_of(weight_files(chosen), chosen.model)}", **made)
    if encoder.facts.weights is not None:
        return marks.marked(encoder.facts.weights, **made)
    if isinstance(encoder.backend, ExportedBackend):
        paths = [Path(tower.path) for tower in (encoder.backend.image, encoder.backend.text) if tower is not None]
        files = [one for path in paths for one in (path, extra_path(path)) if one.is_file()]
    else:
        files = weight_files(chosen)
    return marks.marked(f"file:{_digest_of(files, chosen.model)}", **made)


def _digest_of(files: Sequence[Path], name: str) -> str:
    """Of the bytes of the files; of a model without files here, of its name."""
    digest = hashlib.blake2b(b"" if files else name.encode(), digest_size=8)
    for path in files:
        add_file(digest, path)
    return digest.hexdigest()


def weights_digest(chosen: Choice) -> str:
    """Of names, sizes and bytes of the files, the same on every machine; of a model without files here, of its name.

    Raises CheckpointError, DownloadError.
    """
    files = weight_files(chosen)
    return digest_of_files(files, or_of="" if files else chosen.model)


def digest_of_files(paths: Sequence[Path], *, or_of: str = "") -> str:
    """The `weights_digest` of files; or_of: a name, where there are none. Raises OSError."""
    digest = hashlib.blake2b(or_of.encode(), digest_size=8)
    for path in paths:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        add_file(digest, path)
    return digest.hexdigest()


def weight_files(chosen: Choice) -> list[Path]:
    """The files that decide on the rows of a model; a published one is downloaded.

    Raises CheckpointError, DownloadError.
    """
    if chosen.is_foreign:
        return folders.files_of(chosen.model, download_root=chosen.download_root)
    given = Path(chosen.model)
    if zoo.named(chosen.model) is None and not given.exists():
        exported = sorted(given.parent.glob(f"{glob.escape(given.name)}.*"))  # the prefix of exported files
        if exported:
            return [path for path in exported if path.is_file()]
    return hub.files_of(hub.weight_file(chosen.model, download_root=chosen.download_root))


def _states(paths: Sequence[Path]) -> list[list[object]]:
    found = [(path.resolve(), path.stat()) for path in paths if path.is_file()]
    return [[str(path), status.st_size, status.st_mtime_ns] for path, status in found]
