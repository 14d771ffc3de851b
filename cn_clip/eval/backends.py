"""How the evaluation commands open a model, with the lines they print."""

from typing import Protocol

from cn_clip import zoo
from cn_clip.clip.backends.base import Backend, BackendName
from cn_clip.clip.backends.opening import open_backend
from cn_clip.clip.encoder import Encoder
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
    def backend(self) -> BackendName: ...
    @property
    def device(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def context_length(self) -> int: ...


def open_encoder(options: ModelOptions, say: Speaker) -> Encoder:
    """The encoder a command's settings ask for; the command has checked that there is a `resume`.

    precision: "amp" is "fp32", as in Chinese-CLIP's evaluation. Raises as `open_backend`.
    """
    assert options.resume is not None
    for kind, name in (("vision", options.vision_model), ("text", options.text_model)):
        if name:
            say(f"Loading {kind} model config from {zoo.config_path(name)}")
    precision = "fp32" if options.precision == "amp" else options.precision
    if options.backend != "torch":
        device = None if options.device == "auto" else options.device
        backend = open_backend(
            options.resume,
            backend=options.backend,
            precision=precision,
            device=device,
            vision=options.vision_model,
            text=options.text_model,
            say=say.note,
        )
        say(f"=> opened '{options.resume}' ({options.backend}, {precision})")
        return Encoder(backend, context_length=options.context_length)
    return Encoder(_open_torch(options, precision, say), context_length=options.context_length)


def _open_torch(options: ModelOptions, precision: str, say: Speaker) -> Backend:
    from cn_clip import ranks
    from cn_clip.clip.backends.pytorch import TorchBackend
    from cn_clip.clip.loading import open_model

    assert options.resume is not None
    say(f"Begin to load model checkpoint from {options.resume}.")
    model, checkpoint = open_model(options.resume, vision=options.vision_model, text=options.text_model)
    say(f"=> loaded checkpoint '{options.resume}' (epoch {checkpoint.epoch} @ {checkpoint.step} steps)")
    return TorchBackend(model, device=ranks.choose_device(options.device), precision=precision)


def num_parameters(backend: Backend) -> tuple[int, int]:
    """All parameters, and those of the picture tower; zeros where a backend does not know them."""
    total, visual = getattr(backend, "num_parameters", (0, 0))
    return total, visual
