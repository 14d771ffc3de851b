"""How the evaluation commands open a checkpoint, with the lines they print."""

from cn_clip import ranks, zoo
from cn_clip.clip.encoder import Backend, TorchBackend
from cn_clip.clip.loading import open_model
from cn_clip.command import Speaker


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
