"""Training checkpoints: written whole or not at all, read back to go on."""

import contextlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cn_clip import zoo
from cn_clip.clip.checkpoint import Checkpoint
from cn_clip.clip.foreign.names import refuse
from cn_clip.clip.hub import weight_file
from cn_clip.errors import CheckpointError, CnClipError, ConfigError, lacked_memory
from cn_clip.jsonl import atomic_write

LATEST, BEST = "epoch_latest.pt", "epoch_best.pt"
_EPOCH_FILE = re.compile(r"epoch(\d+|_\d+_\d+)\.pt")  # a copy that a user gave another name is theirs


@dataclass(frozen=True)
class Position:
    """Where a run stands: `epoch` counted from 0, `batch` of it to come next, `step` updates done in all."""

    epoch: int = 0
    batch: int = 0
    step: int = 0


@dataclass(frozen=True)
class Extent:
    """What a position counts in; another extent makes another run of it.

    num_streams: the order of shards depends on how many readers share them, processes times --num-workers.
    """

    num_batches: int
    batch_size: int
    global_batch: int
    num_samples: int
    world_size: int
    num_streams: int
    seed: int


def checkpoint_content(
    tensors: dict[str, torch.Tensor],
    optimizer: dict[str, Any] | None,
    *,
    name: str,
    position: Position,
    resume: dict[str, Any] | None,
    lora: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The dictionary a checkpoint file holds.

    `epoch`, `step`, `name`, `state_dict` (with "module." names) and `optimizer` are the format of Chinese-CLIP, which
    counts a begun epoch as its own number; `resume` is what it has no place for, `lora` what adapters are. What is None
    is left out.
    """
    begun_epoch = position.epoch + (1 if position.batch else 0)
    content: dict[str, Any] = {
        "epoch": begun_epoch,
        "step": position.step,
        "name": name,
        "state_dict": {f"module.{key}": value for key, value in tensors.items()},
    }
    if optimizer is not None:
        content["optimizer"] = optimizer
    if resume is not None:
        content["resume"] = {"epoch": position.epoch, "batch": position.batch, **resume}
    if lora is not None:
        content["lora"] = lora
    return content


def save(content: dict[str, Any], paths: list[Path]) -> float:
    """Writes the file once, gives it every name in `paths`, and returns the seconds it took.

    Raises CheckpointError when it cannot be written, e.g. on a full disk; files written earlier stay as they were.
    """
    begin = time.monotonic()
    first, *others = paths
    try:
        with atomic_write(first, "wb") as stream:
            torch.save(content, stream)
        for other in others:
            _give_name(first, other)
    except (OSError, RuntimeError) as error:  # torch.save wraps the error of the file system
        cause = error.__cause__ or error.__context__ or error
        raise CheckpointError(
            f"{first}: could not be written ({cause}); the checkpoints written before are intact; "
            "free some space (--keep-checkpoints N deletes old ones) and start the same command again"
        ) from error
    return time.monotonic() - begin


def _give_name(file: Path, name: Path) -> None:
    """Makes `name` the same file by a hard link, or a copy where the file system has none; never a torn one."""
    temporary = name.with_name(f".{name.name}.tmp")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    try:
        os.link(file, temporary)
    except OSError:
        shutil.copyfile(file, temporary)
    os.replace(temporary, name)


def clear_remains(checkpoint_dir: Path) -> None:
    """Deletes what saves that were killed left half written."""
    for path in checkpoint_dir.glob(".epoch*.tmp"):
        path.unlink()


def prune(checkpoint_dir: Path, keep: int | None) -> list[Path]:
    """Deletes all but the `keep` newest epoch files, besides the latest and the best; returns the deleted ones."""
    if keep is None:
        return []
    old = _newest_first(checkpoint_dir)[keep:]
    for path in old:
        path.unlink()
    return old


def _newest_first(checkpoint_dir: Path) -> list[Path]:
    files = [path for path in checkpoint_dir.glob("*.pt") if _EPOCH_FILE.fullmatch(path.name)]
    return sorted(files, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def find_resume(resume: str | None, checkpoint_dir: Path) -> list[Path]:
    """The checkpoints to start from, best first: the given one alone, else those of this experiment, newest first.

    resume: a path, or the name of a published or bundled model. Raises CheckpointError when the given one is not there:
    a run never starts from scratch in silence.
    """
    if resume is not None:
        path = weight_file(resume) if zoo.named(resume) and not os.path.exists(resume) else Path(resume)
        if not os.path.exists(path):  # unlike Path.exists, also for a name that is too long
            refuse(resume)
            known = {model.filename: name for name, model in zoo.downloadable().items()}
            name = known.get(path.name)
            fetch = f"; fetch it with: cn-clip download {name} --download-root {path.parent}" if name else ""
            raise CheckpointError(
                f"--resume {resume}: no such file{fetch}; training stops rather than start from scratch"
            )
        return [path]
    latest = checkpoint_dir / LATEST
    return [path for path in (latest, *_newest_first(checkpoint_dir)) if path.is_file()]


def read_first_good(
    paths: list[Path], read: Callable[[Path], Checkpoint]
) -> tuple[Checkpoint | None, list[CheckpointError]]:
    """The first file that can be read, and what was wrong with those before it; None for no path.

    Raises the last CheckpointError when none can be read.
    """
    errors: list[CheckpointError] = []
    for path in paths:
        try:
            return read(path), errors
        except CheckpointError as error:
            errors.append(error)
    if errors:
        raise errors[-1]
    return None, []


def resume_entry(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `_save` of the trainer put beside weights and optimizer; empty for files that do not say all of it."""
    saved: dict[str, Any] = checkpoint.extra.get("resume") or {}
    return saved if "extent" in saved else {}


def resume_position(checkpoint: Checkpoint, extent: Extent) -> Position:
    """Where to go on. Files of Chinese-CLIP only know whole epochs; ours know the batch.

    Raises CheckpointError when data, batch size or number of processes differ from when the file was written.
    """
    saved = resume_entry(checkpoint)
    if not saved:
        return Position(checkpoint.epoch, 0, checkpoint.step)
    was, now = saved["extent"], asdict(extent)
    changed = [f"{name} was {was[name]}, is {now[name]}" for name in now if was[name] != now[name]]
    if changed:
        raise CheckpointError(
            f"{checkpoint.path}: {'; '.join(changed)}. Epochs, steps and the order of the data mean something else "
            "now; go back to the old settings, or add --reset-data-offset to start at the beginning of the data with "
            "these weights and this optimizer state"
        )
    return Position(saved["epoch"], saved["batch"], checkpoint.step)


def rng_state(device: torch.device) -> dict[str, Any]:
    """The random state of PyTorch on the CPU and on the device of the run: dropout, patch masks."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def restore_rng(state: dict[str, Any], device: torch.device) -> None:
    """Puts back what `rng_state` took, as far as it is of this kind of device."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    elif "mps" in state and device.type == "mps":
        torch.mps.set_rng_state(state["mps"])


@contextlib.contextmanager
def explained_memory() -> Iterator[None]:
    """Turns "out of memory" into a ConfigError that names the flags that help."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, CnClipError) or not lacked_memory(error):
            raise
        text = str(error)
        raise ConfigError(
            f"out of memory ({text.splitlines()[0] if text else 'no details'}); these flags need less, in this order: "
            "--grad-checkpointing, --precision bf16, a smaller --batch-size with a larger --accum-freq (the same "
            "global batch), --mask-ratio 0.5, --lora-rank 16, --freeze-vision, and on several devices --fsdp"
        ) from error
