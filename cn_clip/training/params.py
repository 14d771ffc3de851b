"""The settings of training: one frozen dataclass, flags and defaults as in Chinese-CLIP."""

from argparse import Namespace
from dataclasses import dataclass
from typing import Literal

from cn_clip import command
from cn_clip.errors import ConfigError
from cn_clip.zoo import VISION_MODELS, TextName, VisionName

# AdamW's settings by picture tower. Source: arXiv:2103.00020, tables 19 and 20; eps and beta2 differ by family.
_VIT = {"lr": 5.0e-4, "beta1": 0.9, "beta2": 0.98, "eps": 1.0e-6}
_LARGE = {**_VIT, "lr": 4.0e-4}
_RESNET = {"lr": 5.0e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1.0e-8}
OPTIMIZER_DEFAULTS = {"ViT-L-14": _LARGE, "ViT-L-14-336": _LARGE, "RN50": _RESNET}
OPTIMIZER_DEFAULTS |= {"RN-Tiny-64": _RESNET, "RN-Small-64": _RESNET}


@dataclass(frozen=True)
class Options:
    """Trains or fine-tunes a model on a dataset, in one process or, started by torchrun, in many."""

    train_data: str
    """Path to the LMDB directory with training data split, or WebDataset shards: 'shards/{000..099}.tar'"""
    val_data: str | None = None
    """Path to the LMDB directory with validation data split; None disables validation"""
    num_workers: int = 4
    """Number of processes that prepare training data"""
    valid_num_workers: int = 1
    """Number of processes that prepare validation data"""
    logs: str = "./logs/"
    """Where experiments are stored, each in a folder of its name"""
    name: str = "train_clip"
    """Name of the experiment"""
    log_interval: int = 10
    """Log every N steps"""
    report_training_batch_acc: bool = False
    """Log the accuracy inside the training batch"""
    batch_size: int = 64
    """Pairs in a training batch"""
    valid_batch_size: int = 64
    """Pairs in a validation batch"""
    max_steps: int | None = None
    """Number of steps to train for; --max-steps overrides --max-epochs"""
    max_epochs: int = 32
    """Number of epochs to train for; --max-steps overrides --max-epochs"""
    valid_step_interval: int | None = None
    """Validate every N steps; None or -1: never by steps"""
    valid_epoch_interval: int | None = 1
    """Validate every N epochs; None or -1: never by epochs"""
    context_length: int = 52
    """Longest text in tokens, [CLS] and [SEP] included"""
    lr: float | None = None
    """Learning rate; default by picture tower"""
    beta1: float | None = None
    """Adam's beta 1; default by picture tower"""
    beta2: float | None = None
    """Adam's beta 2; default by picture tower"""
    eps: float | None = None
    """Adam's epsilon; default by picture tower"""
    wd: float = 0.2
    """Weight decay"""
    warmup: int = 500
    """Number of steps over which the learning rate rises"""
    use_bn_sync: bool = False
    """Synchronise batch normalisation between processes (CUDA)"""
    use_augment: bool = False
    """Vary training pictures: random crop, flip, AutoAugment"""
    skip_scheduler: bool = False
    """Keep the learning rate after warm-up instead of the cosine decay"""
    save_epoch_frequency: int = 1
    """Keep a checkpoint every N epochs; -1: only the last"""
    save_step_frequency: int = -1
    """Keep a checkpoint every N steps; -1: never by steps"""
    resume: str | None = None
    """Checkpoint to start from, or a model's name; default: the latest checkpoint of this experiment, if any"""
    reset_optimizer: bool = False
    """Start from the weights of --resume without its optimizer state"""
    reset_data_offset: bool = False
    """Start from the weights of --resume at the beginning of the data"""
    precision: Literal["amp", "fp16", "fp32", "bf16"] = "amp"
    """Arithmetic; amp: mixed float16 on CUDA, mixed bfloat16 on CPUs that have it, float32 elsewhere"""
    vision_model: VisionName = "ViT-B-16"
    """Picture tower"""
    mask_ratio: float = 0
    """Share of the patches left out at random in training (FLIP)"""
    clip_weight_path: str | None = None
    """OpenAI CLIP weights the picture tower starts from"""
    freeze_vision: bool = False
    """Do not train the picture tower"""
    text_model: TextName = "RoBERTa-wwm-ext-base-chinese"
    """Text tower"""
    bert_weight_path: str | None = None
    """Chinese BERT weights the text tower starts from"""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time"""
    use_flash_attention: bool = False
    """Accepted; FlashAttention is used wherever PyTorch offers it"""
    accum_freq: int = 1
    """Batches joined into one update, with the gradient of one large batch"""
    gather_with_grad: bool = False
    """Gather features of all processes with gradients"""
    skip_aggregate: bool = False
    """Do not gather features: each process contrasts its own batch alone"""
    debug: bool = False
    """Log at level DEBUG too"""
    seed: int = 123
    """Seed of the data order and of random weights"""
    distillation: bool = False
    """Learn from the picture features of a teacher model too"""
    teacher_model_name: str | None = None
    """The teacher of --distillation: a checkpoint, a model's name, or a ModelScope model id"""
    kd_loss_weight: float = 0.5
    """Weight of the loss of --distillation"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps"""
    num_threads: int | None = None
    """CPU threads of PyTorch; default: its own choice"""
    fsdp: bool = False
    """Split weights, gradients and optimizer state over the processes (FSDP2) instead of copying them (DDP)"""
    compile: bool = False
    """Compile both towers (torch.compile): slow to start, faster steps"""
    loss: Literal["clip", "siglip"] = "clip"
    """clip: softmax over the batch (InfoNCE); siglip: a sigmoid for each pair"""
    multi_positive: bool = False
    """Pairs of one batch that share a picture or a text are not each other's negatives"""
    freeze_text: bool = False
    """Do not train the text tower"""
    freeze_text_layers: int = 0
    """Do not train the embeddings and the first N layers of the text tower"""
    lora_rank: int = 0
    """Train low-rank adapters of this rank instead of the weights (needs peft); 0: off"""
    lora_alpha: float | None = None
    """Scale of the adapters, divided by their rank; default: twice the rank"""
    on_error: Literal["stop", "skip"] = "stop"
    """A training picture that cannot be read: stop and name it, or train on with the next pair and count it"""
    keep_checkpoints: int | None = None
    """Keep the N newest epoch files besides the latest and the best one; default: all"""
    early_stop: int | None = None
    """Stop after N validations in a row without a better mean recall; default: never"""
    report_to: Literal["none", "tensorboard"] = "none"
    """Write events for TensorBoard into the experiment's folder"""

    # See `command.spelled_out`.
    ADDED = (
        "compile",
        "device",
        "early_stop",
        "freeze_text",
        "freeze_text_layers",
        "fsdp",
        "keep_checkpoints",
        "num_threads",
        "report_to",
    )

    def __post_init__(self) -> None:
        for name in ("batch_size", "valid_batch_size", "max_epochs", "log_interval", "accum_freq"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("num_workers", "valid_num_workers", "warmup"):
            _require(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        _require(self.max_steps is None or self.max_steps >= 1, "max_steps", "at least 1", self.max_steps)
        _require(0 <= self.mask_ratio < 1, "mask_ratio", "a value in [0, 1)", self.mask_ratio)
        _require(3 <= self.context_length <= 512, "context_length", "3 to 512", self.context_length)
        for name in ("freeze_text_layers", "lora_rank"):
            _require(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        for name in ("keep_checkpoints", "early_stop"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, "at least 1", value)
        if self.distillation and not self.teacher_model_name:
            raise ConfigError("--distillation: needs --teacher-model-name, a checkpoint or the name of a model")
        if self.fsdp and self.precision == "fp16":
            raise ConfigError(
                "--fsdp and --precision fp16: FSDP takes weights of one type; use --precision bf16 or amp"
            )
        if self.gather_with_grad and self.skip_aggregate:
            raise ConfigError("--gather-with-grad and --skip-aggregate contradict each other; choose one")

    def optimizer_setting(self, name: Literal["lr", "beta1", "beta2", "eps"]) -> float:
        """The given value, else the default of the picture tower."""
        value: float | None = getattr(self, name)
        return OPTIMIZER_DEFAULTS.get(self.vision_model, _VIT)[name] if value is None else value


def _require(holds: bool, name: str, expected: str, value: object) -> None:
    if not holds:
        raise ConfigError(f"--{name.replace('_', '-')}: expected {expected}, got {value}")


def get_default_params(model_name: str) -> dict[str, float]:
    """AdamW's lr, beta1, beta2 and eps for a picture tower; empty for an unknown one."""
    settings = {**dict.fromkeys(VISION_MODELS, _VIT), **OPTIMIZER_DEFAULTS, "RN101": _RESNET, "RN50x4": _RESNET}
    return dict(settings.get(model_name, {}))


def parse_args() -> Namespace:
    """What Chinese-CLIP's gives: its options and ours, `aggregate`, and AdamW's settings of the picture tower."""
    args = command.namespace(Options)
    args.aggregate = not args.skip_aggregate
    for name, value in get_default_params(args.vision_model).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args
