"""Training checkpoints: written whole or not at all, read back to go on."""

import contextlib
import os
import re
import shutil
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch

from cn_clip import zoo
from cn_clip.clip.families.names import refuse
from cn_clip.clip.weights.checkpoint import Checkpoint, read_checkpoint
from cn_clip.clip.weights.hub import weight_file
from cn_clip.digests import is_file
from cn_clip.errors import CheckpointError, ConfigError
from cn_clip.files import atomic_write
from cn_clip.settings import flag
from cn_clip.training.logger import logger
from cn_clip.training.params import Options

LATEST, BEST = "epoch_latest.pt", "epoch_best.pt"
_BEGIN_AGAIN = (
    "add --reset-data-offset to start at the beginning of the data with these weights and this optimizer state"
)
_EPOCH_FILE = re.compile(r"epoch(\d+|_\d+_\d+)\.pt")  # a copy that a user gave another name is theirs


@dataclass(frozen=True)
class Position:
    """How far a run is: `epoch` counted from 0, `batch` of it to come next, `step` updates done in all."""

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
    context_length: int,
    resume: dict[str, Any] | None,
    matryoshka: tuple[int, ...] = (),
    lora: dict[str, Any] | None = None,
    base: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The dictionary a checkpoint file holds.

    `epoch`, `step`, `name`, `state_dict` (with "module." names) and `optimizer` are the format of Chinese-CLIP, which
    counts a begun epoch as its own number. It has no key for `context_length`, the longest text in tokens, for
    `matryoshka`, the dimensions at which vectors may be cut, for `resume`, which only training reads, for `lora`, what
    adapters are, and for `base`, the weights that they belong to where the file does not hold them. What is None or
    empty is left out.
    """
    begun_epoch = position.epoch + (1 if position.batch else 0)
    content: dict[str, Any] = {
        "epoch": begun_epoch,
        "step": position.step,
        "name": name,
        "state_dict": {f"module.{key}": value for key, value in tensors.items()},
        "context_length": int(context_length),
    }
    if optimizer is not None:
        content["optimizer"] = optimizer
    if matryoshka:
        content["matryoshka"] = list(matryoshka)
    if resume is not None:
        content["resume"] = {"epoch": position.epoch, "batch": position.batch, **resume}
    if lora is not None:
        content["lora"] = lora
    if base is not None:
        content["base"] = base
    return content


def save(content: dict[str, Any], paths: list[Path]) -> None:
    """Writes a file of its own under each of `paths`, all or none, and logs them.

    Raises CheckpointError when they cannot be written, e.g. on a full disk; files written earlier stay as they were.
    """
    begin = time.monotonic()
    try:
        with contextlib.ExitStack() as stack:
            # The last one opened is the first to get its name: a kill in between leaves a run whose newest file counts.
            first, *others = [stack.enter_context(atomic_write(path, "wb")) for path in reversed(paths)][::-1]
            torch.save(content, first)
            first.flush()
            for other in others:
                _copy(first, other)
            for stream in (first, *others):
                os.fsync(stream.fileno())
    except (OSError, RuntimeError) as error:  # torch.save wraps the error of the file system
        cause = error.__cause__ or error.__context__ or error
        raise CheckpointError(
            f"could not be written ({cause}); the checkpoints written before are intact; "
            "free some space (--keep-checkpoints N deletes old ones) and start the same command again",
            at=paths[0],
        ) from error
    seconds = time.monotonic() - begin
    where = f"(epoch {content['epoch']} @ {content['step']} steps)"
    for path in paths:
        logger.info(f"Saved checkpoint {path} {where} (writing took {seconds} seconds)")


def _copy(source: IO[bytes], target: IO[bytes]) -> None:
    """Fills an empty file with the bytes of another; a file system that can share their blocks copies none of them."""
    size, done = os.fstat(source.fileno()).st_size, 0
    with contextlib.suppress(OSError, AttributeError):  # neither here nor between these files: copied below
        while done < size:
            step = os.copy_file_range(source.fileno(), target.fileno(), size - done, done, done)
            if not step:
                break
            done += step
    with os.fdopen(os.dup(source.fileno()), "rb") as again:
        again.seek(done)
        target.seek(done)
        shutil.copyfileobj(again, target, 1 << 20)
    target.flush()


def clear_leftovers(checkpoint_dir: Path) -> None:
    """Clears away what killed saves left half written; for the process that has the lock. Raises OSError."""
    for path in checkpoint_dir.glob(".epoch*.tmp"):
        if path.is_dir():
            shutil.rmtree(path)
        else:  # of an earlier version
            path.unlink()


def epoch_files(checkpoint_dir: Path) -> list[Path]:
    """The files of a run that are kept by number, newest first: not the latest, nor the best."""
    files = [path for path in checkpoint_dir.glob("*.pt") if _EPOCH_FILE.fullmatch(path.name)]
    return sorted(files, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def prune(checkpoint_dir: Path, keep: int, *, spared: Collection[Path] = ()) -> list[Path]:
    """Deletes all but the `keep` newest epoch files, or none if it is -1; returns the deleted ones.

    spared: files that stay and do not count.
    """
    old = _beyond(checkpoint_dir, keep, spared)
    for path in old:
        path.unlink()
    return old


def _beyond(checkpoint_dir: Path, keep: int, spared: Collection[Path]) -> list[Path]:
    return [] if keep < 0 else [path for path in epoch_files(checkpoint_dir) if path not in spared][keep:]


@dataclass(frozen=True)
class DiskPlan:
    """What the checkpoints of a run take on the disk, in bytes. num_kept: files with the state of an optimizer."""

    file_bytes: int
    num_kept: int
    best_bytes: int

    @property
    def most_bytes(self) -> int:
        """With an epoch file and the latest being written beside those that they will replace."""
        return (self.num_kept + 2) * self.file_bytes + 2 * self.best_bytes

    def line(self, folder: Path, keep: int) -> str:
        """What the run says of it when it begins.

        "each checkpoint takes 2.26 GB, at most 3 are kept (--keep-checkpoints 2, and the latest), and 0.75 GB for the
        best weights; with those that are being written 12.80 GB; 41.00 GB are free in runs/x/checkpoints"
        """
        best = f", and {_size(self.best_bytes)} for the best weights" if self.best_bytes else ""
        return (
            f"each checkpoint takes {_size(self.file_bytes)}, at most {self.num_kept} are kept (--keep-checkpoints "
            f"{keep}, and the latest){best}; with those that are being written "
            f"{_size(self.most_bytes)}; {_size(shutil.disk_usage(folder).free)} are free in {folder}"
        )

    def fits(self, folder: Path, keep: int, *, spared: Collection[Path] = ()) -> bool:
        """Whether the disk has room for it, counting that of the files in `folder` that will go, see `prune`."""
        num_new = self.num_kept - 1
        there = [folder / LATEST, folder / BEST, *_beyond(folder, max(keep - num_new, min(keep, 0)), spared)]
        going = sum(path.stat().st_size for path in there if is_file(path))
        return self.most_bytes <= shutil.disk_usage(folder).free + going


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"


def own_checkpoints(checkpoint_dir: Path) -> list[Path]:
    """The checkpoints that this experiment has written, best to go on from first."""
    latest = checkpoint_dir / LATEST
    return [path for path in (latest, *epoch_files(checkpoint_dir)) if is_file(path)]


def discard(checkpoint_dir: Path, *, kept: Path | None) -> list[Path]:
    """Deletes the checkpoints of this experiment but for `kept`; returns the deleted ones."""
    old = [path for path in {*own_checkpoints(checkpoint_dir), checkpoint_dir / BEST} if is_file(path)]
    old = sorted(path for path in old if kept is None or not path.samefile(kept))
    for path in old:
        path.unlink()
    return old


@dataclass(frozen=True)
class Start:
    """The checkpoint a run begins from. is_own: this experiment wrote it. origin: what the run's first weights were.

    with_optimizer, with_position: whether optimizer state, and the position in the data, are taken from it too.
    """

    path: Path
    is_own: bool
    origin: str | None
    with_optimizer: bool
    with_position: bool

    def is_first(self, options: Options) -> bool:
        """Whether these are first weights, those of --init: adapters in them are merged."""
        return not self.is_own and options.init is not None


def choose_start(options: Options, checkpoint_dir: Path) -> Start | None:
    """What a run begins from, None for random weights: --resume, else its own newest checkpoint, else --init.

    With --overwrite its own checkpoints do not count. Raises CheckpointError when a given file is not there (a run
    never starts from scratch in silence) or no checkpoint of its own can be read, ConfigError when progress would be
    overwritten, or when --init is not what its own checkpoints began with.
    """
    takes = {"with_optimizer": not options.reset_optimizer, "with_position": not options.reset_data_offset}
    own = None if options.overwrite else _newest_own(checkpoint_dir, must_be_good=options.resume is None)
    if options.resume is not None:
        path = find_weights("--resume", options.resume)
        given = read_checkpoint(path, merge_lora=False)
        is_own = path.resolve().parent == checkpoint_dir.resolve()
        if own is not None:
            _refuse_lost_progress(options, own, kept=given.step if is_own or takes["with_position"] else 0)
        return Start(path, is_own, _origin(given) if is_own else _identity(options.resume), **takes)
    if own is not None:
        _refuse_other_origin(options, own)
        if options.init is not None:
            logger.info("--init %s gave this run its first weights; it goes on from %s", options.init, own.path)
        return Start(own.path, True, _origin(own), **takes)
    for name in ("reset_optimizer", "reset_data_offset"):
        if getattr(options, name):
            logger.warning("%s changes nothing: the run begins from no checkpoint.", flag(name))
    if options.init is None:
        return None
    path = find_weights("--init", options.init)
    return Start(path, False, _identity(options.init), with_optimizer=False, with_position=False)


def _newest_own(checkpoint_dir: Path, *, must_be_good: bool) -> Checkpoint | None:
    """The newest of the run's own checkpoints that can be read, None without one.

    Raises the last CheckpointError when there are some and none can be read, if `must_be_good`.
    """
    errors: list[CheckpointError] = []
    for path in own_checkpoints(checkpoint_dir):
        try:
            own = read_checkpoint(path, merge_lora=False)
        except CheckpointError as error:
            errors.append(error)
            continue
        for earlier in errors:
            logger.warning("%s; the next older checkpoint is tried.", earlier)
        return own
    if errors and must_be_good:
        raise errors[-1]
    return None


def find_weights(name: str, value: str) -> Path:
    """The file or folder of a path, or of the name of a published or bundled model, given with the flag `name`.

    Raises CheckpointError when it is not there.
    """
    path = weight_file(value) if zoo.named(value) and not os.path.exists(value) else Path(value)
    if not os.path.exists(path):  # unlike Path.exists, also for a name that is too long
        refuse(value)
        known = {model.filename: name for name, model in zoo.downloadable().items()}
        model = known.get(path.name)
        fetch = f"; fetch it with: cn-clip download {model} --download-root {path.parent}" if model else ""
        raise CheckpointError(f"{name} {value}: no such file{fetch}; training stops rather than start from scratch")
    return path


def _identity(value: str) -> str:
    """What distinguishes first weights in a checkpoint: the name of a model, or a whole path."""
    return value if zoo.named(value) and not os.path.exists(value) else os.path.realpath(value)


def _origin(checkpoint: Checkpoint) -> str | None:
    """The first weights of the run that wrote a checkpoint; None when they were random, or it does not say."""
    origin: str | None = resume_entry(checkpoint).get("origin")
    return origin


def _refuse_lost_progress(options: Options, own: Checkpoint, *, kept: int) -> None:
    """Raises ConfigError when the run would begin at step `kept`, before its own checkpoint.

    Worked example: --resume pretrained.pt --reset-data-offset begins at step 0. In an empty folder it runs; killed at
    step 500 and started again it is refused, for the folder holds step 500. --resume with the folder's own newest file
    loses nothing, whatever is reset.
    """
    if own.step <= kept:
        return
    resets = [flag(name) for name in ("reset_optimizer", "reset_data_offset") if getattr(options, name)]
    raise ConfigError(
        f"{' '.join([f'--resume {options.resume}', *resets])}: would begin at step {kept}, but {own.path} holds step "
        f"{own.step} of this run. To go on from there, leave these flags out, or give --init {options.resume} in their "
        "place: the same command then begins and goes on; to start again and delete the old checkpoints, add "
        "--overwrite; to keep both runs, choose another --name"
    )


def _refuse_other_origin(options: Options, own: Checkpoint) -> None:
    """Raises ConfigError when --init names other weights than those the run is known to have begun with."""
    origin = _origin(own)
    if options.init is None or "origin" not in resume_entry(own) or origin in (options.init, _identity(options.init)):
        return
    began, goes_on = "random weights", "leave --init out"
    if origin is not None:
        began, goes_on = origin, f"give --init {origin}"
    raise ConfigError(
        f"--init {options.init}: {own.path} is of a run that began with {began}. To go on with that run, {goes_on}; to "
        "start again and delete the old checkpoints, add --overwrite; to keep both runs, choose another --name"
    )


def resume_entry(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `_save` of the trainer put beside weights and optimizer; empty for files that do not say all of it."""
    saved = checkpoint.extra.get("resume")
    return saved if isinstance(saved, dict) and isinstance(saved.get("extent"), dict) else {}


def resume_position(checkpoint: Checkpoint, extent: Extent) -> Position:
    """Where to go on. Files of Chinese-CLIP only know whole epochs; ours know the batch.

    Raises CheckpointError when data, batch size or number of processes differ from when the file was written.
    """
    saved = resume_entry(checkpoint)
    if not saved:
        return Position(checkpoint.epoch, 0, checkpoint.step)
    was, now = saved["extent"], asdict(extent)
    changed = [f"{name} was {was.get(name)}, is {now[name]}" for name in now if was.get(name) != now[name]]
    if changed:
        raise CheckpointError(
            f"{'; '.join(changed)}. Epochs, steps and the order of the data mean something else "
            f"now; go back to the old settings, or {_BEGIN_AGAIN}",
            at=checkpoint.path,
        )
    position = Position(saved.get("epoch", -1), saved.get("batch", -1), checkpoint.step)
    if any(type(number) is not int or number < 0 for number in vars(position).values()):
        raise CheckpointError(f"says no place in the data ({position}); {_BEGIN_AGAIN}", at=checkpoint.path)
    return position


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
