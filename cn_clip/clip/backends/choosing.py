"""`backend="auto"`: the fastest backend and precision that is installed, that this machine has, and that loses little.

`Encoder` and `clip.opening` ask `decide` before they open a model. What may be taken is tried from the fastest on
(`speeds.order`): its package, its arithmetic, its export, its loss. The first without an objection is taken:

    AVX2, bound 0.999: onnx int8 (0.9971: too far from float32) -> openvino fp32 (not installed) -> onnx fp32: taken

Nothing is exported before it is known that it can run. The loss is measured on this processor, once: what was exported
or measured on another counts there alone.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cn_clip import ranks
from cn_clip.clip.backends import open_vino, parity, speeds
from cn_clip.clip.backends.base import facts_of
from cn_clip.clip.backends.exported import Announce, Source, announce, files_of_prefix, keep_losses, kept_losses
from cn_clip.clip.backends.names import (
    KINDS,
    LEAST_COSINE,
    BackendName,
    Kind,
    Precision,
    check_cosine,
    check_precision,
    settled,
    torch_precisions,
)
from cn_clip.clip.backends.opening import open_source, ready_files, settle_precision
from cn_clip.clip.backends.speeds import DeviceKind, Mode
from cn_clip.clip.tokenizer import CONTEXT_LENGTH
from cn_clip.errors import CnClipError, ConfigError
from cn_clip.language import both, translated
from cn_clip.progress import working

if TYPE_CHECKING:
    import torch

# The packages whose version decides on what a backend computes.
_RUNTIMES: dict[BackendName, tuple[str, ...]] = {
    "torch": ("torch",),
    "onnx": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt",),
}


@dataclass(frozen=True)
class Decision:
    """What "auto" took, and why.

    kind: of the device it goes by. cosines: the smallest to float32 of each tower, none of float32 itself.
    bound: the smallest that was allowed, None for any. passed_over: what is faster, and why it was not taken.
    only: why nothing else could be taken, "" where there was a choice.
    """

    mode: Mode
    kind: DeviceKind
    cosines: Mapping[Kind, float]
    bound: float | None = None
    passed_over: tuple[tuple[Mode, str], ...] = ()
    only: str = ""

    @property
    def backend(self) -> BackendName:
        """What computes."""
        return self.mode.backend

    @property
    def precision(self) -> Precision:
        """In what."""
        return self.mode.precision

    def __str__(self) -> str:
        chinese, english = [f"后端：auto -> {self.mode}"], [f"backend: auto -> {self.mode}"]
        name, measured = speeds.NAMES[self.kind], speeds.MEASURED.get(self.kind)
        if self.only:
            chinese.append(translated(self.only))
            english.append(self.only)
        elif measured is not None:
            pictures, texts = measured.speeds[self.mode]
            chinese.append(f"{name} 上实测是 Chinese-CLIP 的图片 {pictures:g} 倍、文本 {texts:g} 倍")
            english.append(f"on {name} measured at {pictures:g} times Chinese-CLIP on pictures, {texts:g} on texts")
        else:
            chinese.append(f"{name} 上预计最快（没有实测）")
            english.append(f"expected to be the fastest on {name} (not measured)")
        if self.cosines:
            found = f"{min(self.cosines.values()):.5f}"
            chinese.append(f"与 float32 的最小余弦 {found}（要求 ≥ {self.bound:g}）")
            english.append(f"smallest cosine to float32 {found} (wanted: {self.bound:g})")
        for mode, reason in self.passed_over:
            chinese.append(f"没有取 {mode}（{translated(reason)}）")
            english.append(f"not {mode} ({reason})")
        return both("；".join(chinese), "; ".join(english))

    def values(self) -> dict[str, Any]:
        """The same for programs."""
        measured = speeds.MEASURED.get(self.kind)
        pair = None if measured is None or self.only else measured.speeds[self.mode]
        return {
            "backend": self.backend,
            "precision": self.precision,
            "device_kind": self.kind,
            "times_reference": None if pair is None else {"pictures": pair[0], "texts": pair[1]},
            "cosine_min": dict(self.cosines),
            "wanted_cosine": self.bound,
            "passed_over": [{"mode": str(mode), "reason": reason} for mode, reason in self.passed_over],
            "why": str(self),
        }


def decide(
    model: str | Path,
    *,
    precision: str = "auto",
    device: "str | torch.device | None" = None,
    vision: str | None = None,
    text: str | None = None,
    download_root: str | Path | None = None,
    num_threads: int | None = None,
    compile: bool = False,
    merge_tokens: int = 0,
    kinds: Sequence[Kind] = KINDS,
    min_cosine: float | None = None,
    say: Announce = announce,
) -> Decision:
    """What to open a model with; what that takes is exported then.

    precision: "auto", or one that is wanted, of whose loss nothing is asked unless `min_cosine` is given.
    min_cosine: the smallest cosine to float32 that the parity samples may have; default LEAST_COSINE.
    compile: for `torch.compile`, which the torch backend alone has. merge_tokens: of the files that are exported; the
    loss is that of the arithmetic, measured without merging. Others as of `open_backend`.
    Raises ConfigError when nothing can be taken, CheckpointError or DownloadError when there are no such weights.
    """
    return decide_for(
        Source(model, vision, text, download_root, merge_tokens),
        precision=precision,
        device=device,
        num_threads=num_threads,
        compile=compile,
        kinds=kinds,
        min_cosine=min_cosine,
        say=say,
    )


def decide_for(
    source: Source,
    *,
    precision: str = "auto",
    device: "str | torch.device | None" = None,
    num_threads: int | None = None,
    compile: bool = False,
    kinds: Sequence[Kind] = KINDS,
    min_cosine: float | None = None,
    say: Announce = announce,
) -> Decision:
    """`decide` for weights of any family."""
    wanted = check_precision("auto", precision)
    check_cosine(min_cosine)
    kind = device_kind(device)
    bound = min_cosine or (LEAST_COSINE if wanted == "auto" else None)
    candidates = [mode for mode in speeds.order(kind) if wanted in ("auto", mode.precision)]
    candidates = [mode for mode in candidates if mode.backend != "torch" or _torch_has(mode.precision, device, kind)]
    if compile:
        candidates = [mode for mode in candidates if mode.backend == "torch"]
    if not candidates:
        raise ConfigError(
            f"precision: this machine has no hardware for {wanted} ({speeds.NAMES[kind]}); use auto or fp32, or name a "
            "backend that computes in it all the same"
        )
    if not files_of_prefix(source.model, "onnx"):
        source.folder()
    settings: dict[str, Any] = {"device": device, "num_threads": num_threads, "kinds": kinds, "say": say}
    exact = replace(source, merge_tokens=0)
    where = None if device is None else str(device)
    passed_over: list[tuple[Mode, str]] = []
    for mode in candidates:
        try:
            source.check_model(mode.backend)
            if mode.backend != "torch":
                _check_has(mode)
                ready_files(source, kinds, backend=mode.backend, precision=mode.precision, device=where, say=say)
            cosines = {} if bound is None else losses(exact, mode, kind, settings)
            if bound is not None and not min(cosines.values(), default=1.0) >= bound:
                raise ConfigError(f"smallest cosine to float32 {min(cosines.values()):.5f}, wanted {bound:g}")
        except CnClipError as error:
            passed_over.append((mode, str(error)))
            continue
        decision = Decision(mode, kind, cosines, bound, tuple(passed_over), only=source.unmeasured)
        logging.getLogger(__name__).info("%s", decision)
        return decision
    reasons = "; ".join(f"{mode}: {reason}" for mode, reason in passed_over)
    raise ConfigError(f"backend: nothing here runs {source.model} in {wanted}: {reasons}")


def only_torch(
    precision: str, device: "str | torch.device | None", why: str, *, min_cosine: float | None = None
) -> Decision:
    """The decision for models that PyTorch alone runs; their loss is not measured.

    Raises ConfigError for a bound on it.
    """
    if min_cosine is not None:
        raise ConfigError(f"min_cosine: {why}, and its loss is not measured; leave it out")
    check_precision("torch", precision)
    taken = settled("torch", precision, torch_precisions(ranks.choose_device(device)))
    return Decision(Mode("torch", taken), device_kind(device), {}, only=why)


def device_kind(device: "str | torch.device | None") -> DeviceKind:
    """The kind of the processor, or "gpu", as PyTorch would choose; PyTorch is imported only where it may find one."""
    name = "auto" if device is None else str(device)
    if name == "cpu" or (name == "auto" and _is_cpu_build()):
        return ranks.processor_kind()
    return ranks.processor_kind() if ranks.choose_device(device).type == "cpu" else "gpu"


def _is_cpu_build() -> bool:
    """Whether the PyTorch that is installed knows no GPU."""
    return (_version("torch") or "+cpu").endswith("+cpu")


def _version(*names: str) -> str | None:
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _torch_has(precision: Precision, device: "str | torch.device | None", kind: DeviceKind) -> bool:
    """Whether PyTorch computes in it in hardware."""
    if kind == "gpu":
        return precision in torch_precisions(ranks.choose_device(device))
    return precision == "fp32" or (precision == "bf16" and ranks.cpu_has_bf16())


def _check_has(mode: Mode) -> None:
    """Raises ConfigError or MissingExtraError for what this processor computes slowly or not at all."""
    settle_precision(mode.backend, mode.precision)
    if mode == ("openvino", "bf16") and "bf16" not in open_vino.native_precisions():
        raise ConfigError("precision: this processor computes bf16 by way of float32, which is not faster")


def losses(source: Source, mode: Mode, kind: DeviceKind, settings: Mapping[str, Any]) -> Mapping[Kind, float]:
    """The smallest cosine to float32 of each tower wanted, on the parity samples; none of float32 itself.

    Measured once for a kind of processor and a version of what computes, and kept beside the exports.
    settings: of `open_source`.
    """
    if mode.precision == "fp32":
        return {}
    kinds: Sequence[Kind] = settings["kinds"]
    has_folder = not files_of_prefix(source.model, "onnx")
    name = f"{mode.backend} {_version(*_RUNTIMES[mode.backend])} {mode.precision} {kind}"
    known = kept_losses(source).get(name, {}) if has_folder else {}
    if set(kinds) <= known.keys():
        return {one: known[one] for one in kinds}
    with working(both(f"测量 {mode} 与 float32 的差别", f"measuring how close {mode} is to float32")):
        exact = open_source(source, backend=mode.backend, precision="fp32", **settings)
        samples = source.samples(min(CONTEXT_LENGTH, facts_of(exact).max_length or CONTEXT_LENGTH))
        expected = parity.reference(exact, samples, kinds)
        del exact
        opened = open_source(source, backend=mode.backend, precision=mode.precision, **settings)
        found = {one: parity.smallest_cosine(opened, one, expected) for one in kinds}
    if has_folder:
        try:
            keep_losses(source, name, found)
        except ConfigError as error:  # measured again the next time
            logging.getLogger(__name__).info("%s", error)
    return found
