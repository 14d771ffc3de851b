"""The settings of training: one frozen dataclass, flags and defaults as in Chinese-CLIP."""

from argparse import Namespace
from dataclasses import dataclass
from typing import Annotated, Literal

from cn_clip import command, ranks
from cn_clip.clip.picture_names import Decode
from cn_clip.errors import ConfigError
from cn_clip.option_types import Device, StrictFp32
from cn_clip.settings import Range, Rule, check, excludes, flag, is_given, needs
from cn_clip.zoo import CONTEXT_LENGTH, VISION_MODELS, TextName, VisionName, vision_config

# AdamW's settings by picture tower. Source: arXiv:2103.00020, tables 19 and 20; eps and beta2 differ by family.
_VIT = {"lr": 5.0e-4, "beta1": 0.9, "beta2": 0.98, "eps": 1.0e-6}
_LARGE = {**_VIT, "lr": 4.0e-4}
_RESNET = {"lr": 5.0e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1.0e-8}
OPTIMIZER_DEFAULTS = {"ViT-L-14": _LARGE, "ViT-L-14-336": _LARGE, "RN50": _RESNET}
OPTIMIZER_DEFAULTS |= {"RN-Tiny-64": _RESNET, "RN-Small-64": _RESNET}
# Epoch files that a run keeps unless it is told how many.
KEPT_CHECKPOINTS = 2


@dataclass(frozen=True)
class Options:
    """Trains or fine-tunes a model on a dataset, in one process or, started by torchrun, in many."""

    train_data: str
    """Path to the LMDB directory with training data split, or WebDataset shards: 'shards/{000..099}.tar'"""
    val_data: str | None = None
    """Path to the LMDB directory with validation data split; None disables validation"""
    num_workers: Annotated[int | None, Range(least=0)] = None
    """Processes that prepare training data; default: one a core of this process, at most 8, on the CPU 4"""
    valid_num_workers: Annotated[int | None, Range(least=0)] = None
    """Processes that prepare validation data; default: one a core of this process, at most 4, on the CPU 1"""
    logs: str = "./logs/"
    """Where experiments are stored, each in a folder of its name"""
    name: str = "train_clip"
    """Name of the experiment"""
    log_interval: Annotated[int, Range(least=1)] = 10
    """Log every N steps"""
    report_training_batch_acc: bool = False
    """Log the accuracy inside the training batch"""
    batch_size: Annotated[int, Range(least=1)] = 64
    """Pairs in a training batch"""
    valid_batch_size: Annotated[int, Range(least=1)] = 64
    """Pairs in a validation batch"""
    max_steps: Annotated[int | None, Range(least=1)] = None
    """Number of steps to train for; --max-steps overrides --max-epochs"""
    max_epochs: Annotated[int, Range(least=1)] = 32
    """Number of epochs to train for; --max-steps overrides --max-epochs"""
    valid_step_interval: Annotated[int | None, Range(least=-1)] = None
    """Validate every N steps; None or -1: never by steps"""
    valid_epoch_interval: Annotated[int | None, Range(least=-1)] = 1
    """Validate every N epochs; None or -1: never by epochs"""
    context_length: Annotated[int, Range(least=3, most=512)] = CONTEXT_LENGTH
    """Longest text in tokens, [CLS] and [SEP] included; default: that of the checkpoint it begins from, else 52"""
    lr: Annotated[float | None, Range(above=0)] = None
    """Learning rate; default by picture tower"""
    beta1: Annotated[float | None, Range(least=0, below=1)] = None
    """Adam's beta 1; default by picture tower"""
    beta2: Annotated[float | None, Range(least=0, below=1)] = None
    """Adam's beta 2; default by picture tower"""
    eps: Annotated[float | None, Range(above=0)] = None
    """Adam's epsilon; default by picture tower"""
    wd: Annotated[float, Range(least=0)] = 0.2
    """Weight decay"""
    warmup: Annotated[int, Range(least=0)] = 500
    """Number of steps over which the learning rate rises"""
    use_bn_sync: bool = False
    """Synchronise batch normalisation between processes (CUDA)"""
    use_augment: bool = False
    """Vary training pictures: random crop, flip, AutoAugment"""
    skip_scheduler: bool = False
    """Keep the learning rate after warm-up instead of the cosine decay"""
    save_epoch_frequency: Annotated[int, Range(least=-1)] = 1
    """Keep a checkpoint every N epochs; -1: only the last"""
    save_step_frequency: Annotated[int, Range(least=-1)] = -1
    """Keep a checkpoint every N steps; -1: never by steps"""
    resume: str | None = None
    """Checkpoint to go on from, with optimizer and position in the data; default: this experiment's latest, if any"""
    reset_optimizer: bool = False
    """Start from the weights of --resume without its optimizer state"""
    reset_data_offset: bool = False
    """Start from the weights of --resume at the beginning of the data"""
    precision: Literal["auto", "amp", "fp16", "fp32", "bf16"] = "auto"
    """auto: mixed bfloat16 on GPUs that have it, else amp: mixed float16 on CUDA, bfloat16 on CPUs that have it"""
    vision_model: VisionName = "ViT-B-16"
    """Picture tower"""
    mask_ratio: Annotated[float, Range(least=0, below=1)] = 0
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
    """Accepted, changes nothing: on CUDA pictures have FlashAttention in half precision, texts a kernel with a mask"""
    accum_freq: Annotated[int, Range(least=1)] = 1
    """Batches joined into one update, with the gradient of one large batch"""
    gather_with_grad: bool = False
    """Gather features of all processes with gradients"""
    skip_aggregate: bool = False
    """Do not gather features: each process contrasts its own batch alone"""
    debug: bool = False
    """Log at level DEBUG too"""
    seed: Annotated[int, Range(least=-(2**63), most=2**63 - 1)] = 123
    """Seed of the data order and of random weights"""
    distillation: bool = False
    """Learn from the picture features of a teacher model too"""
    teacher_model_name: str | None = None
    """The teacher of --distillation: a checkpoint, a model's name, or a ModelScope model id"""
    kd_loss_weight: Annotated[float, Range(least=0)] = 0.5
    """Weight of the loss of --distillation"""
    device: Device = "auto"
    num_threads: Annotated[int | None, Range(least=1)] = None
    """CPU threads of PyTorch; default: its own choice"""
    valid_precision: Literal["auto", "training", "fp32"] = "auto"
    """Arithmetic of validation; auto: that of the training on CUDA and with --precision bf16, else fp32"""
    strict_fp32: StrictFp32 = False
    fsdp: bool = False
    """Split weights, gradients and optimizer state over the processes (FSDP2) instead of copying them (DDP)"""
    compile: bool = False
    """Compile both towers (torch.compile): slow to start, faster steps"""
    loss: Literal["clip", "siglip"] = "clip"
    """clip: softmax over the batch (InfoNCE); siglip: a sigmoid for each pair"""
    multi_positive: bool = False
    """Pairs of one batch that share a picture or a text are not each other's negatives"""
    matryoshka: str | None = None
    """Train the first so many numbers of each vector to do alone, too, e.g. 64,128: vectors can then be cut there"""
    local_loss: bool = False
    """Each process computes the loss of its own pairs among those of all: the same gradients, less work and memory"""
    freeze_text: bool = False
    """Do not train the text tower"""
    freeze_text_layers: Annotated[int, Range(least=0)] = 0
    """Do not train the embeddings and the first N layers of the text tower"""
    lora_rank: Annotated[int, Range(least=0)] = 0
    """Train low-rank adapters of this rank instead of the weights (needs peft); 0: off"""
    lora_alpha: Annotated[float | None, Range(above=0)] = None
    """Scale of the adapters, divided by their rank; default: twice the rank"""
    save_adapters: bool = False
    """Checkpoints hold only the adapters and name their base, the file or model of --init or --resume"""
    on_error: Literal["stop", "skip"] = "stop"
    """A training picture that cannot be read: stop and name it, or train on with the next pair and count it"""
    decode: Decode = "exact"
    """fast: JPEGs at 1/2, 1/4 or 1/8 of their size where enough remains; reference: grey of 16 bits clipped to white"""
    keep_checkpoints: Annotated[int | None, Range(least=-1)] = None
    """Keep the N newest epoch files besides the latest and the best one; -1: all; default: 2, and all of runs before"""
    freeze_bn: bool = False
    """Keep the running statistics of batch normalisation; default: with --init, if its weights have learned them"""
    no_freeze_bn: bool = False
    """Let the running statistics of batch normalisation follow the training batches, as Chinese-CLIP does"""
    early_stop: Annotated[int | None, Range(least=1)] = None
    """Stop after N validations in a row without a better mean recall; default: never"""
    report_to: Literal["none", "tensorboard"] = "none"
    """Write events for TensorBoard into the experiment's folder"""
    init: str | None = None
    """First weights: a checkpoint or a model's name. The same command again goes on from its own checkpoints"""
    overwrite: bool = False
    """Start again: delete the checkpoints that this experiment has, once the new run is ready to train"""

    # See `command.spelled_out`.
    ADDED = (
        "compile",
        "decode",
        "device",
        "early_stop",
        "freeze_bn",
        "freeze_text",
        "freeze_text_layers",
        "fsdp",
        "keep_checkpoints",
        "local_loss",
        "matryoshka",
        "num_threads",
        "report_to",
        "strict_fp32",
        "valid_precision",
    )

    def __post_init__(self) -> None:
        check(self, RULES)
        _ = self.dimensions

    @property
    def validates(self) -> bool:
        """Whether the run is ever validated."""
        intervals = (self.valid_step_interval, self.valid_epoch_interval)
        return self.val_data is not None and any(interval is not None and interval > 0 for interval in intervals)

    def validates_as_trained(self, device_type: str) -> bool:
        """Whether validation has the arithmetic of the training; else it has float32."""
        if self.valid_precision != "auto":
            return self.valid_precision == "training"
        return device_type == "cuda" or self.precision == "bf16"

    @property
    def dimensions(self) -> tuple[int, ...]:
        """What --matryoshka names, rising, without that of whole vectors; raises ConfigError for no such list."""
        if self.matryoshka is None:
            return ()
        whole, words = vision_config(self.vision_model).embed_dim, self.matryoshka.split(",")
        numbers = sorted({int(word) for word in words if word.strip().isdecimal()})
        if len(numbers) != len(words) or not 1 <= numbers[0] <= numbers[-1] <= whole:
            raise ConfigError(
                f"--matryoshka {self.matryoshka}: expected different numbers from 1 to {whole}, the length of the "
                "vectors, with commas between them, such as 64,128"
            )
        return tuple(number for number in numbers if number < whole)

    @property
    def num_contrasted(self) -> int:
        """Pairs among which the loss lets the model choose."""
        processes = 1 if self.skip_aggregate else ranks.world_size()
        return self.batch_size * self.accum_freq * processes

    def optimizer_setting(self, name: Literal["lr", "beta1", "beta2", "eps"]) -> float:
        """The given value, else the default of the picture tower."""
        value: float | None = getattr(self, name)
        return OPTIMIZER_DEFAULTS.get(self.vision_model, _VIT)[name] if value is None else value


def is_due(count: int, interval: int | None) -> bool:
    """Whether `count` is a multiple of a positive interval; None, 0 and -1 mean never."""
    return interval is not None and interval > 0 and count % interval == 0


def _num_kept_patches(options: Options) -> int | None:
    """The patches that --mask-ratio leaves of a picture; None for a ResNet, which has none."""
    config = vision_config(options.vision_model)
    if config.vision_patch_size is None:
        return None
    return int((config.image_resolution // config.vision_patch_size) ** 2 * (1 - options.mask_ratio))


def has_resnet(options: Options) -> bool:
    """Whether the picture tower is a ResNet."""
    return _num_kept_patches(options) is None


# Which options need, exclude or silence each other. Refused: what cannot be meant, and flags that Chinese-CLIP does not
# have. Warned of: what Chinese-CLIP takes although it changes nothing, so that its command lines still run.
RULES: tuple[Rule, ...] = (
    Rule(("name",), lambda options: not options.name, "--name: expected the name of a folder in --logs", True),
    excludes("init", "resume", "both name the first weights; give one of them", refused=True),
    excludes("init", "reset_optimizer", "--init begins with a fresh optimizer anyway; leave it out", refused=True),
    excludes(
        "init", "reset_data_offset", "--init begins at the beginning of the data anyway; leave it out", refused=True
    ),
    *(
        excludes(
            name, other, f"{flag(name)} gives the weights of both towers; leave {flag(other)} out", refused=refused
        )
        for name, refused in (("init", True), ("resume", False))
        for other in ("clip_weight_path", "bert_weight_path")
    ),
    needs("distillation", "teacher_model_name", ", a checkpoint or the name of a model", refused=True),
    needs("teacher_model_name", "distillation", refused=False),
    needs("kd_loss_weight", "distillation", refused=False),
    needs("lora_alpha", "lora_rank", refused=True),
    needs("save_adapters", "lora_rank", refused=True),
    Rule(
        ("save_adapters", "precision"),
        lambda options: options.save_adapters and options.precision == "fp16",
        "--save-adapters and --precision fp16: the run would train on rounded weights, not on those of the base; use "
        "--precision bf16 or amp",
        True,
    ),
    Rule(
        ("lora_rank", "freeze_vision", "freeze_text"),
        lambda options: options.lora_rank and options.freeze_vision and options.freeze_text,
        "--lora-rank with --freeze-vision and --freeze-text: both towers are frozen, there is nothing to adapt; "
        "leave one to be trained",
        True,
    ),
    excludes("freeze_text", "freeze_text_layers", "the first one freezes all layers; leave one out", refused=False),
    needs("early_stop", "val_data", refused=True),
    Rule(
        ("early_stop", "valid_step_interval", "valid_epoch_interval"),
        lambda options: options.early_stop and options.val_data is not None and not options.validates,
        "--early-stop: needs validation; --valid-step-interval and --valid-epoch-interval ask for none",
        True,
    ),
    Rule(
        (
            "valid_batch_size",
            "valid_num_workers",
            "valid_precision",
            "valid_step_interval",
            "valid_epoch_interval",
            "val_data",
        ),
        lambda options: (
            options.val_data is None
            and (
                # An interval of -1 or None asks for nothing; 0 processes are a choice.
                any(is_given(options, name) for name in ("valid_num_workers", "valid_precision"))
                or any(
                    is_given(options, name) and (getattr(options, name) or 0) > 0
                    for name in ("valid_batch_size", "valid_step_interval", "valid_epoch_interval")
                )
            )
        ),
        "no --val-data: --valid-batch-size, --valid-num-workers, --valid-precision, --valid-step-interval, "
        "--valid-epoch-interval change nothing",
        False,
    ),
    Rule(
        ("val_data", "valid_step_interval", "valid_epoch_interval"),
        lambda options: options.val_data is not None and not options.validates,
        "--val-data: changes nothing; --valid-step-interval and --valid-epoch-interval ask for no validation",
        False,
    ),
    Rule(
        ("valid_batch_size", "val_data"),
        lambda options: options.validates and options.valid_batch_size == 1,
        "--valid-batch-size 1: loss and accuracies inside a batch of one pair say nothing; look at Validation Recall "
        "of --val-data",
        False,
    ),
    excludes("max_steps", "max_epochs", "the steps count, the epochs change nothing", refused=False),
    Rule(
        ("batch_size", "accum_freq", "skip_aggregate"),
        lambda options: options.num_contrasted < 2 and not options.distillation,
        "--batch-size 1: a pair is learned by telling it from others, and a global batch of one pair has none: the "
        "loss would be 0; raise --batch-size or --accum-freq, or gather the features of several processes (no "
        "--skip-aggregate)",
        True,
    ),
    Rule(
        ("batch_size", "accum_freq", "skip_aggregate", "distillation"),
        lambda options: options.num_contrasted < 2 and options.distillation,
        "--batch-size 1: a global batch of one pair has nothing to tell apart: only --distillation teaches, the text "
        "tower learns nothing; raise --batch-size or --accum-freq, or leave --skip-aggregate out",
        False,
    ),
    needs("local_loss", "gather_with_grad", ", which brings the gradients that other processes compute", refused=True),
    Rule(
        ("local_loss",),
        lambda options: options.local_loss and ranks.world_size() == 1,
        "--local-loss changes nothing: there is one process.",
        False,
    ),
    excludes("gather_with_grad", "skip_aggregate", "they contradict each other; choose one", refused=True),
    Rule(
        ("fsdp", "precision"),
        lambda options: options.fsdp and options.precision == "fp16",
        "--fsdp and --precision fp16: FSDP takes weights of one type; use --precision bf16 or amp",
        True,
    ),
    Rule(
        ("valid_precision", "precision"),
        lambda options: options.valid_precision == "fp32" and options.precision == "fp16",
        "--valid-precision fp32 and --precision fp16: the weights are float16; leave one out",
        True,
    ),
    Rule(
        ("strict_fp32", "precision", "valid_precision"),
        lambda options: options.strict_fp32 and "fp32" not in (options.precision, options.valid_precision),
        "--strict-fp32: is for float32; it needs --precision fp32, or --valid-precision fp32",
        True,
    ),
    Rule(
        ("mask_ratio", "vision_model"),
        lambda options: _num_kept_patches(options) == 0,
        "--mask-ratio: leaves no patch of a picture of this --vision-model; choose a smaller one",
        True,
    ),
    Rule(
        ("mask_ratio", "vision_model"),
        lambda options: options.mask_ratio and has_resnet(options),
        "--mask-ratio changes nothing: a ResNet (--vision-model) has no patches to leave out.",
        False,
    ),
    Rule(
        ("grad_checkpointing", "vision_model"),
        lambda options: options.grad_checkpointing and has_resnet(options),
        "--grad-checkpointing works only on the text tower: this --vision-model is a ResNet.",
        False,
    ),
    Rule(
        ("use_bn_sync", "vision_model"),
        lambda options: options.use_bn_sync and not has_resnet(options),
        "--use-bn-sync changes nothing: this --vision-model has no batch normalisation.",
        False,
    ),
    excludes(
        "freeze_bn",
        "no_freeze_bn",
        "they contradict each other; choose one (the scripts in run_scripts/ give --no-freeze-bn: set the environment "
        "variable freeze_bn to --freeze-bn)",
        refused=True,
    ),
    excludes(
        "freeze_bn",
        "use_bn_sync",
        "statistics that do not change need not be synchronised; --use-bn-sync changes nothing",
        refused=False,
    ),
    Rule(
        ("freeze_bn", "vision_model"),
        lambda options: options.freeze_bn and not has_resnet(options),
        "--freeze-bn changes nothing: this --vision-model has no batch normalisation.",
        False,
    ),
    Rule(
        ("no_freeze_bn", "lora_rank", "freeze_vision"),
        lambda options: options.no_freeze_bn and (options.lora_rank or options.freeze_vision) and has_resnet(options),
        "--no-freeze-bn changes nothing: --lora-rank and --freeze-vision keep the statistics of batch normalisation.",
        False,
    ),
    Rule(
        ("use_flash_attention",),
        lambda options: options.use_flash_attention,
        "--use-flash-attention changes nothing: PyTorch's kernels are used, on CUDA in half precision FlashAttention "
        "or cuDNN's for pictures, and the memory-efficient one for texts: they need a mask for padding.",
        False,
    ),
    Rule(
        ("keep_checkpoints",),
        lambda options: options.keep_checkpoints == 0,
        "--keep-checkpoints: expected at least 1, or -1 to keep all, got 0",
        True,
    ),
    Rule(
        ("keep_checkpoints", "save_epoch_frequency", "save_step_frequency"),
        lambda options: (
            options.keep_checkpoints is not None and max(options.save_epoch_frequency, options.save_step_frequency) < 1
        ),
        "--keep-checkpoints changes nothing: --save-epoch-frequency and --save-step-frequency keep only the last one",
        False,
    ),
)


def get_default_params(model_name: str) -> dict[str, float]:
    """AdamW's lr, beta1, beta2 and eps for a picture tower; empty for an unknown one."""
    settings = {**dict.fromkeys(VISION_MODELS, _VIT), **OPTIMIZER_DEFAULTS, "RN101": _RESNET, "RN50x4": _RESNET}
    return dict(settings.get(model_name, {}))


def parse_args() -> Namespace:
    """What Chinese-CLIP's gives: its options and ours, `aggregate`, and AdamW's settings of the picture tower."""
    args = command.namespace(Options)
    args.aggregate = not args.skip_aggregate
    # Loops written for Chinese-CLIP know none of our defaults but its own.
    if args.precision == "auto":
        args.precision = "amp"
    for name, number in (("num_workers", 4), ("valid_num_workers", 1)):
        if getattr(args, name) is None:
            setattr(args, name, number)
    for name, value in get_default_params(args.vision_model).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args
