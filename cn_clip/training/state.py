"""Training checkpoints: written whole or not at all, read back to go on."""

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cn_clip.clip.checkpoint import Checkpoint, fit, read_checkpoint
from cn_clip.clip.model import CLIP
from cn_clip.errors import CheckpointError
from cn_clip.jsonl import atomic_write

LATEST = "epoch_latest.pt"


@dataclass(frozen=True)
class Position:
    """Where a run stands: `epoch` counted from 0, `batch` of it to come next, `step` updates done in all."""

    epoch: int = 0
    batch: int = 0
    step: int = 0


def checkpoint_content(
    model: CLIP,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    *,
    name: str,
    position: Position,
    num_batches: int,
) -> dict[str, Any]:
    """The dictionary a checkpoint file holds.

    `epoch`, `step`, `name`, `state_dict` (with "module." names) and `optimizer` are the format of Chinese-CLIP, which
    counts a begun epoch as its own number; `resume` is what it has no place for.
    """
    begun_epoch = position.epoch + (1 if position.batch else 0)
    return {
        "epoch": begun_epoch,
        "step": position.step,
        "name": name,
        "state_dict": {f"module.{key}": value for key, value in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "resume": {
            "epoch": position.epoch,
            "batch": position.batch,
            "num_batches": num_batches,
            "scaler": scaler.state_dict(),
            "rng": rng_state(),
        },
    }


def save(content: dict[str, Any], paths: list[Path]) -> float:
    """Writes the file once, gives it every name in `paths`, and returns the seconds it took."""
    begin = time.monotonic()
    first, *others = paths
    with atomic_write(first, "wb") as stream:
        torch.save(content, stream)
    for other in others:
        _give_name(first, other)
    return time.monotonic() - begin


def _give_name(file: Path, name: Path) -> None:
    """Makes `name` the same file by a hard link, or a copy where the file system has none; never a torn one."""
    temporary = name.with_name(f".{name.name}.tmp")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    try:
        os.link(file, temporary)
    except OSError:
        import shutil

        shutil.copyfile(file, temporary)
    os.replace(temporary, name)


def find_resume(resume: str | None, checkpoint_dir: Path) -> Path | None:
    """The checkpoint to start from: the given one, else the latest of this experiment, else None.

    Raises CheckpointError when the given one is not there: a run never starts from scratch in silence.
    """
    if resume is not None:
        path = Path(resume)
        if not path.exists():
            raise CheckpointError(f"--resume {resume}: no such file; training stops rather than start from scratch")
        return path
    latest = checkpoint_dir / LATEST
    return latest if latest.is_file() else None


def load_weights(model: CLIP, path: Path) -> Checkpoint:
    """Copies the tensors of a checkpoint into the model, position embeddings resized; returns the checkpoint."""
    checkpoint = read_checkpoint(path)
    model.load_state_dict(fit(checkpoint.state_dict, model.state_dict(), path))
    return checkpoint


def load_optimizer(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, checkpoint: Checkpoint) -> None:
    """Restores the optimizer and, where the file has it, the gradient scaler.

    Raises CheckpointError when the file has no optimizer state or one of other parameters.
    """
    if checkpoint.optimizer is None:
        raise CheckpointError(f"{checkpoint.path}: no optimizer state in it; add --reset-optimizer")
    fused = [group.get("fused") for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(checkpoint.optimizer)
    except (ValueError, KeyError) as error:
        reason = f"optimizer state does not fit ({error}); add --reset-optimizer"
        raise CheckpointError(f"{checkpoint.path}: {reason}") from error
    for group, value in zip(optimizer.param_groups, fused, strict=True):
        group["fused"], group["lr"] = value, float(group["lr"])
    scaler_state = checkpoint.extra.get("resume", {}).get("scaler")
    if scaler_state:
        scaler.load_state_dict(scaler_state)


def resume_position(checkpoint: Checkpoint, *, num_batches: int) -> Position:
    """Where to go on. Files of Chinese-CLIP only know whole epochs; ours know the batch.

    Raises CheckpointError when the epoch has another number of batches than when the file was written.
    """
    saved = checkpoint.extra.get("resume")
    if saved is None:
        return Position(checkpoint.epoch, 0, checkpoint.step)
    if saved["batch"] and saved["num_batches"] != num_batches:
        raise CheckpointError(
            f"{checkpoint.path}: written in the middle of an epoch of {saved['num_batches']} batches, this run has "
            f"{num_batches}; use the same data and batch size, or add --reset-data-offset"
        )
    return Position(saved["epoch"], saved["batch"], checkpoint.step)


def rng_state() -> dict[str, Any]:
    """The random state of PyTorch: dropout, patch masks."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Puts back what `rng_state` took."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
