"""Trains or fine-tunes: `python cn_clip/training/main.py --train-data=…/lmdb/train …` or `cn-clip train …`."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from cn_clip import command, ranks, zoo
from cn_clip.errors import ConfigError
from cn_clip.training.params import Options

if TYPE_CHECKING:
    import torch

    from cn_clip.clip.model import CLIP
    from cn_clip.training.trainer import Trainer


def run(options: Options) -> None:
    """Trains to the last step; raises CnClipError with the reason when it cannot."""
    from cn_clip.training import logs

    if ranks.world_size() > 1:
        raise ConfigError(f"WORLD_SIZE is {ranks.world_size()}; this version trains in one process, start it alone")
    folder = Path(options.logs) / options.name
    checkpoint_dir = folder / "checkpoints"
    checkpoint_dir.mkdir(parents=True, exist_ok=True)
    started = time.strftime("%Y-%m-%d-%H-%M-%S", time.gmtime())
    with logs.logging_to(folder / f"out_{started}.log", rank=ranks.rank(), debug=options.debug):
        trainer = build_trainer(options, checkpoint_dir)
        values = {**asdict(options), "checkpoint_path": str(checkpoint_dir), "device": trainer.device}
        values |= {"max_steps": trainer.max_steps, "max_epochs": trainer.max_epochs}
        values |= {name: options.optimizer_setting(name) for name in ("lr", "beta1", "beta2", "eps")}
        logs.log_params(values, folder / f"params_{started}.txt")
        logs.logger.info("Use device: %s for training, precision %s", trainer.device, trainer.arithmetic())
        restore(trainer)
        trainer.train()


def build_trainer(options: Options, checkpoint_dir: Path) -> "Trainer":
    """Model, data, optimizer and loop of a run, before anything is restored."""
    import torch

    from cn_clip.training import inputs
    from cn_clip.training.optim import build_optimizer
    from cn_clip.training.trainer import Trainer

    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    device = ranks.choose_device(options.device)
    dtype = ranks.autocast_dtype(options.precision, device)
    torch.manual_seed(options.seed)
    model = build_model(options, device)
    training = inputs.training_data(options, model.resolution)
    validation = inputs.validation_data(options, model.resolution)
    betas = options.optimizer_setting("beta1"), options.optimizer_setting("beta2")
    optimizer = build_optimizer(
        model,
        lr=options.optimizer_setting("lr"),
        betas=betas,
        eps=options.optimizer_setting("eps"),
        weight_decay=options.wd,
    )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    return Trainer(
        options,
        model,
        optimizer,
        scaler,
        training,
        validation,
        device=device,
        autocast_dtype=dtype,
        checkpoint_dir=checkpoint_dir,
    )


def build_model(options: Options, device: "torch.device") -> "CLIP":
    """The model before training: random, or initialised from other models' weights; towers frozen as asked."""
    from cn_clip.clip.loading import load
    from cn_clip.clip.model import CLIP, convert_weights
    from cn_clip.training.logs import logger

    print("Loading vision model config from", zoo.config_path(options.vision_model))
    print("Loading text model config from", zoo.config_path(options.text_model))
    model = CLIP.from_config(zoo.model_config(options.vision_model, options.text_model))
    load(model, device, clip_path=options.clip_weight_path, bert_path=options.bert_weight_path)
    if options.precision == "fp16":
        if device.type != "cuda":
            raise ConfigError(f"--precision fp16: needs CUDA, the device is {device}; use bf16, amp or fp32")
        convert_weights(model)
    if options.grad_checkpointing:
        model.set_grad_checkpointing()
        logger.info("Grad-checkpointing activated.")
    if options.use_flash_attention:
        logger.warning("--use-flash-attention changes nothing: FlashAttention is used wherever PyTorch offers it.")
    if options.freeze_vision:
        model.visual.requires_grad_(False)
        logger.info("The visual encoder is freezed during training.")
    if isinstance(zoo.vision_config(options.vision_model).vision_layers, tuple):
        if options.mask_ratio:
            logger.warning("--mask-ratio changes nothing: a ResNet has no patches to leave out.")
        if options.grad_checkpointing:
            logger.warning("--grad-checkpointing works on the text tower alone, not on a ResNet.")
    return model


def restore(trainer: "Trainer") -> None:
    """Goes back to where --resume, or the latest checkpoint of this experiment, stands."""
    from cn_clip.training import state
    from cn_clip.training.logs import logger

    options = trainer.options
    path = state.find_resume(options.resume, trainer.checkpoint_dir)
    if path is None:
        return
    logger.info("=> begin to load checkpoint '%s'", path)
    checkpoint = state.load_weights(trainer.model, path)
    if not options.reset_data_offset:
        trainer.position = state.resume_position(checkpoint, num_batches=trainer.steps_per_epoch)
    if not options.reset_optimizer:
        state.load_optimizer(trainer.optimizer, trainer.scaler, checkpoint)
        logger.info("=> optimizer state is restored from the checkpoint")
    saved = checkpoint.extra.get("resume")
    if saved and not options.reset_data_offset:
        state.restore_rng(saved["rng"])
    logger.info("=> loaded checkpoint '%s' (epoch %d @ %d steps)", path, checkpoint.epoch, trainer.position.step)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
