"""Many processes as one: starting them, sharing the model (DDP or FSDP2), gathering features, full checkpoints."""

# N rows of all processes, B rows of this one, D embedding, W processes

import contextlib
import gc
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before any group: its default arguments would keep one, and its threads
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from cn_clip import ranks, terminal
from cn_clip.clip.model import CLIP
from cn_clip.clip.visual import ModifiedResNet
from cn_clip.errors import CnClipError, ConfigError
from cn_clip.training.logger import logger
from cn_clip.training.saving import pinned_like

Gather = Literal["none", "values", "gradients"]
ResultT = TypeVar("ResultT")


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Joins the processes torchrun started, NCCL on CUDA and gloo elsewhere; does nothing for a single process.

    With CUDA gloo is there too: what processes exchange between steps must not wait for the device.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ranks.world_size() == 1:
        yield
        return
    names = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise ConfigError(f"WORLD_SIZE is {ranks.world_size()}, but {', '.join(missing)} is not set; use torchrun")
    if device.type == "mps":
        raise ConfigError("--device mps: one process only; PyTorch has no communication between MPS processes")
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield
        wait_for_all()
    except Exception as error:
        if device.type != "cuda":
            raise
        # NCCL's own end would wait for the other processes, and they for this one.
        sentence = str(error) if isinstance(error, CnClipError) else terminal.explained(error)
        if sentence is None:
            logger.exception("unexpected error")
        else:
            logger.error("%s", sentence)
        terminal.leave(1)
    finally:
        # The threads of the group must end before the process does, which they could abort. Meshes of FSDP that lie in
        # cycles would keep them.
        gc.collect()
        dist.destroy_process_group()


def any_process(flag: bool) -> bool:
    """Whether the flag is set in at least one process; every process must ask."""
    if ranks.world_size() == 1:
        return flag
    votes = torch.tensor(float(flag))
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return bool(votes.item())


def wait_for_all() -> None:
    """Returns when every process has come here."""
    any_process(False)


def from_first(value: Any) -> Any:
    """The value of rank 0; every process must ask, the others with anything."""
    values = [value]
    if ranks.world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def together(do: Callable[[], ResultT]) -> ResultT:
    """What `do` returns; fails in every process when it fails in one: none waits for one that has ended.

    Every process must ask. Raises the CnClipError of the first process that has one.
    """
    result, error = None, None
    try:
        result = do()
    except CnClipError as raised:
        error = raised
    fail_together(error)
    return cast(ResultT, result)


def fail_together(error: Exception | None) -> None:
    """Raises `error`, or where this process has none, that of the first one that has; every process must ask."""
    first = next((one for one in every_object(error) if one is not None), None)
    if first is not None:
        raise error or first


def every_object(value: Any) -> list[Any]:
    """The value of each process, by rank; every process must ask."""
    values: list[Any] = [value] * ranks.world_size()
    if ranks.world_size() > 1:
        dist.all_gather_object(values, value)
    return values


# --- features of all processes ----------------------------------------------------------------------------------------


class _GatherWithGradients(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows_BD: Tensor) -> Tensor:
        context.num_rows = len(rows_BD)
        return _gather(rows_BD)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        gradient_ND = gradients[0].contiguous()
        dist.all_reduce(gradient_ND)
        return gradient_ND[rows_of_this(context.num_rows)]


def _gather(rows_BD: Tensor) -> Tensor:
    parts = [torch.empty_like(rows_BD, memory_format=torch.contiguous_format) for _ in range(ranks.world_size())]
    dist.all_gather(parts, rows_BD.detach().contiguous())
    return torch.cat(parts)


def gather_rows(rows_BD: Tensor, mode: Gather) -> Tensor:
    """The rows of all processes in the order of ranks, or with "none" the own ones.

    "values": gradients reach only the own rows. "gradients": the own rows get the gradients of every process's loss.
    Every process must hold as many rows.
    """
    if mode == "none" or ranks.world_size() == 1:
        return rows_BD
    if mode == "gradients" and rows_BD.requires_grad:
        gathered: Tensor = _GatherWithGradients.apply(rows_BD)  # type: ignore[no-untyped-call]
        return gathered
    others_ND, own = _gather(rows_BD), rows_of_this(len(rows_BD))
    return torch.cat([others_ND[: own.start], rows_BD, others_ND[own.stop :]])


def rows_of_this(num_rows: int) -> slice:
    """Where this process's `num_rows` rows lie among those of all, as `gather_rows` orders them."""
    start = ranks.rank() * num_rows
    return slice(start, start + num_rows)


def sum_of_all(values: Tensor) -> Tensor:
    """The sum over the processes; every process must ask. The device is not waited for."""
    if ranks.world_size() > 1:
        dist.all_reduce(values)
    return values


def own_share(num_rows: int) -> list[int]:
    """The rows this process computes: every W-th, as many as any other process, if need be from the beginning again."""
    size = -(-num_rows // ranks.world_size())
    return [(ranks.rank() + ranks.world_size() * number) % num_rows for number in range(size)]


def gather_shares(rows_BD: Tensor, num_rows: int) -> Tensor:
    """All `num_rows` rows in order, where every process computed its `own_share`; no gradients."""
    if ranks.world_size() == 1:
        return rows_BD
    parts = _gather(rows_BD).view(ranks.world_size(), len(rows_BD), -1)
    return parts.transpose(0, 1).flatten(0, 1)[:num_rows]


# --- the model over processes -----------------------------------------------------------------------------------------


class Parallel:
    """A model as training calls it: whole, copied to every process (DDP) or split over them (FSDP2)."""

    def __init__(
        self, model: CLIP, device: torch.device, *, fsdp: bool = False, gathered_type: torch.dtype | None = None
    ) -> None:
        """Wraps `model`, which lies on `device`. Raises ConfigError for FSDP with one process.

        gathered_type: with FSDP, in which weights are sent to the processes and computed with; None: their own. What
        each process keeps, the gradients and the checkpoints have the weights' own.
        """
        self.model, self.device, self.fsdp = model, device, fsdp
        self.module: nn.Module = model
        self.loose: list[nn.Parameter] = []
        if not fsdp:
            if device.type == "cuda" and isinstance(model.visual, ModifiedResNet):
                model.visual.use_channels_last()
            if ranks.world_size() > 1:
                devices = [device] if device.type == "cuda" else None
                # Gradients lie in the buckets that are exchanged, instead of beside them: less memory, fewer copies.
                self.module = nn.parallel.DistributedDataParallel(
                    model, device_ids=devices, gradient_as_bucket_view=True
                )
            return
        if ranks.world_size() == 1:
            raise ConfigError("--fsdp: splits a model over several processes, there is one; start it with torchrun")
        if "ignored_params" not in inspect.signature(fully_shard).parameters:
            raise ConfigError(f"--fsdp: needs PyTorch 2.7 or newer, this is {torch.__version__}")
        mesh = init_device_mesh(device.type, (ranks.world_size(),))
        self.loose = [parameter for parameter in model.parameters() if parameter.ndim == 0]
        for parameter in self.loose:
            dist.broadcast(parameter.data, 0)
        policy = MixedPrecisionPolicy()
        if gathered_type is not None:
            policy = MixedPrecisionPolicy(param_dtype=gathered_type, reduce_dtype=torch.float32)
        for block in blocks(model):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=set(self.loose))

    def __call__(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    @property
    def logit_bias(self) -> nn.Parameter | None:
        """Of the sigmoid loss; None without it."""
        return self.model.logit_bias

    @contextlib.contextmanager
    def without_gradients(self) -> Iterator[None]:
        """Only a forward pass: DDP has nothing to prepare, and statistics of batch normalisation stay."""
        module, self.module = self.module, self.model
        norms = [norm for norm in self.model.modules() if isinstance(norm, nn.modules.batchnorm._BatchNorm)]
        tracked = [norm.track_running_stats for norm in norms]
        for norm in norms:
            norm.track_running_stats = not norm.training
        try:
            with torch.no_grad():
                yield
        finally:
            self.module = module
            for norm, value in zip(norms, tracked, strict=True):
                norm.track_running_stats = value

    def accumulating(self, more_to_come: bool) -> AbstractContextManager[Any]:
        """Around forward and backward: leaves out the exchange of gradients while more are to be added."""
        if self.fsdp:
            cast(Any, self.model).set_requires_gradient_sync(not more_to_come)
        elif more_to_come and isinstance(self.module, nn.parallel.DistributedDataParallel):
            return cast(AbstractContextManager[Any], self.module.no_sync())
        return contextlib.nullcontext()

    def finish_gradients(self) -> None:
        """After the last backward pass: the mean over processes for what FSDP does not look after."""
        for parameter in self.loose:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad.div_(ranks.world_size())

    def share_statistics(self) -> None:
        """Gives every process the running statistics of rank 0; every process must ask."""
        if ranks.world_size() > 1:
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)

    def state_dict(self) -> dict[str, Tensor]:
        """The whole model's tensors under its own names, on rank 0; every process must ask."""
        return {name: whole(value) for name, value in self.model.state_dict().items()}


def blocks(model: CLIP) -> list[nn.Module]:
    """The repeated layers of both towers: what FSDP splits and torch.compile compiles one by one."""
    visual = model.visual
    if isinstance(visual, ModifiedResNet):
        stages = [visual.layer1, visual.layer2, visual.layer3, visual.layer4]
        pictures = [block for stage in stages for block in cast(nn.Sequential, stage)]
    else:
        pictures = list(visual.transformer.resblocks)
    return [*pictures, *model.bert.encoder.layer]


def compile_blocks(model: CLIP) -> None:
    """Compiles each block, in all its variants, to draw the same random numbers as uncompiled.

    Variants: with and without gradients, mixed precision, only the class token, sizes. Past its limit PyTorch would run
    one uncompiled, and the two passes of gradient caching would no longer draw the same.
    """
    from torch import _dynamo, _inductor  # loading them takes seconds, and only --compile needs them

    limit = "recompile_limit" if hasattr(_dynamo.config, "recompile_limit") else "cache_size_limit"
    setattr(_dynamo.config, limit, 64)
    _inductor.config.fallback_random = True
    for block in blocks(model):
        block.compile()


def whole(value: Tensor) -> Tensor:
    """A tensor split over processes put together in the memory of rank 0, empty elsewhere; others pass, contiguous."""
    if not isinstance(value, DTensor):
        return value.contiguous()
    full: Tensor = value.full_tensor()
    if ranks.rank() != 0:
        return full.new_empty(0)
    # One by one, or the device would have to hold the whole model.
    pinned = pinned_like(full) if full.device.type == "cuda" else None
    return full.cpu() if pinned is None else pinned.copy_(full)


def like(value: Tensor, target: Tensor) -> Tensor:
    """The whole tensor `value` split as `target` is, or laid out in memory as it; the same on every process."""
    if not isinstance(target, DTensor):
        # The fused AdamW takes moments only in the layout of their weight.
        return value if value.stride() == target.stride() else torch.empty_like(target, dtype=value.dtype).copy_(value)
    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
