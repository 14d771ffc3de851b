"""Records tests/golden/training.npz: five updates of the reference's own training loop on a small model, no dropout.

REFERENCE/bin/python tools/golden/record_training.py
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import reference_shim  # noqa: E402, F401
import torch  # noqa: E402
from deterministic import SMALL_MODEL, state_dict, training_batches  # noqa: E402

import cn_clip.training.train as reference_train  # noqa: E402
from cn_clip.clip.model import CLIP  # noqa: E402
from cn_clip.training.scheduler import cosine_lr  # noqa: E402


class Loader(list):  # type: ignore[type-arg]
    @property
    def num_batches(self) -> int:
        return len(self)

    num_samples = 40


def main() -> None:
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *a, **k: self
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}
    torch.distributed.init_process_group("gloo")
    clip = CLIP(**SMALL_MODEL)
    shapes = [(name, tuple(value.shape)) for name, value in clip.state_dict().items()]
    clip.load_state_dict({name: torch.from_numpy(value) for name, value in state_dict(shapes).items()})
    model = torch.nn.parallel.DistributedDataParallel(clip.float())
    args = SimpleNamespace(
        accum_freq=1, distillation=False, aggregate=True, gather_with_grad=False, report_training_batch_acc=True,
        freeze_vision=False, local_device_rank=0, precision="fp32", mask_ratio=0, max_steps=5, rank=0, world_size=1,
        log_interval=1, val_data=None, valid_step_interval=None, should_save=False, save_step_frequency=-1,
    )  # fmt: skip

    def exclude(name: str) -> bool:
        return "bn" in name or "ln" in name or "bias" in name or "logit_scale" in name

    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if exclude(n)], "weight_decay": 0.0},
        {"params": [p for n, p in named if not exclude(n)], "weight_decay": 0.2},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), eps=1e-6)
    schedule = cosine_lr(optimizer, 1e-3, 2, 5)
    losses, rates = [], []
    get_loss = reference_train.get_loss

    def recording(*a: object, **k: object) -> object:
        loss, accuracy = get_loss(*a, **k)
        losses.append(loss.item())
        rates.append(optimizer.param_groups[0]["lr"])
        return loss, accuracy

    reference_train.get_loss = recording
    batches = [
        (torch.from_numpy(pixels), torch.from_numpy(tokens), torch.zeros(len(tokens)))
        for pixels, tokens in training_batches()
    ]
    data = {"train": SimpleNamespace(dataloader=Loader(batches), sampler=None)}
    reference_train.train(model, data, 0, optimizer, None, schedule, args, 0)
    names = ["visual.conv1.weight", "bert.encoder.layer.0.attention.self.query.weight", "logit_scale", "visual.proj"]
    weights = {name: clip.state_dict()[name].numpy() for name in names}
    np.savez_compressed(ROOT / "tests" / "golden" / "training.npz", losses=losses, rates=rates, **weights)
    print(losses, rates, clip.logit_scale.item())


if __name__ == "__main__":
    main()
