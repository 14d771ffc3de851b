"""How the evaluation commands open a checkpoint, with the lines they print."""

from typing import Protocol

from cn_clip import ranks, zoo
from cn_clip.clip.encoder import Backend, Encoder, TorchBackend
from cn_clip.clip.loading import open_model
from cn_clip.command import Speaker


class ModelOptions(Protocol):
    """The settings every evaluation command has."""

    @property
    def resume(self) -> str | None: ...
    @property
    def vision_model(self) -> str | None: ...
    @property
    def text_model(self) -> str | None: ...
    @property
    def device(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def context_length(self) -> int: ...


def open_encoder(options: ModelOptions, say: Speaker) -> Encoder:
    """The encoder a command's settings ask for; the command has checked that there is a `resume`.

    Raises as `open_backend`.
    """
    assert options.resume is not None
    backend = open_backend(
        options.resume,
        vision=options.vision_model,
        text=options.text_model,
        device=options.device,
        precision=options.precision,
        say=say,
    )
    return Encoder(backend, context_length=options.context_length)


def open_backend(
    resume: str, *, vision: str | None, text: str | None, device: str, precision: str, say: Speaker
) -> Backend:
    """The towers of a checkpoint on a device. precision: "amp" is "fp32", as in Chinese-CLIP's evaluation.

    Raises CheckpointError, DownloadError or ConfigError.
    """
    for name in filter(None, (vision, text)):
        kind = "vision" if name == vision else "text"
        say(f"Loading {kind} model config from {zoo.config_path(name)}")
    say(f"Begin to load model checkpoint from {resume}.")
    model, checkpoint = open_model(resume, vision=vision, text=text)
    say(f"=> loaded checkpoint '{resume}' (epoch {checkpoint.epoch} @ {checkpoint.step} steps)")
    chosen = "fp32" if precision == "amp" else precision
    return TorchBackend(model, device=ranks.choose_device(device), precision=chosen)


def num_parameters(backend: Backend) -> tuple[int, int]:
    """All parameters, and those of the picture tower; (0, 0) for a backend that does not hold them."""
    if not isinstance(backend, TorchBackend):
        return 0, 0
    parts = backend.model, backend.model.visual
    total, visual = (sum(parameter.numel() for parameter in part.parameters()) for part in parts)
    return total, visual
