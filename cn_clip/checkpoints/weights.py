"""What the commands on weight files do: describe, average and fit them, and write them in every form.

The folders that transformers and sentence-transformers open are written here too.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from cn_clip import __version__, files, zoo
from cn_clip.clip.loading import build
from cn_clip.clip.model import convert_weights
from cn_clip.clip.tokenizer import CONTEXT_LENGTH, END, START, UNKNOWN, VOCAB_FILE, Tokenizer
from cn_clip.clip.weights import hf
from cn_clip.clip.weights.checkpoint import SIGMOID_BIAS, Checkpoint, fit, infer_config, read_checkpoint
from cn_clip.clip.weights.hf import PICTURE_FILE, picture_fields
from cn_clip.clip.weights.low_rank import is_adapter, trained
from cn_clip.clip.weights.writing import check_same_tensors, refuse_inputs, write_checkpoint, write_safetensors
from cn_clip.errors import CheckpointError, ConfigError
from cn_clip.files import atomic_write, staged_folder
from cn_clip.zoo import ModelConfig

Precision = Literal["keep", "fp16", "fp32"]
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
# What leaves a trace in features but none in the names and shapes of tensors.
_UNSEEN = ("image_resolution", "vision_head_width", "text_num_attention_heads", "text_hidden_act")


# --- the work of the commands; each raises CheckpointError for a file that cannot be read


def strip(file: str, output: str, precision: Precision) -> int:
    """Writes only the weights of a checkpoint, as a .pt; returns how many tensors."""
    refuse_inputs(output, [file])
    checkpoint = read_checkpoint(file, mapped=True)
    _refuse_bases("--output", output, [checkpoint])
    tensors = in_precision(checkpoint, precision)
    # Chinese-CLIP refuses a tensor it does not know; similarity does not need this one.
    kept = {name: value for name, value in tensors.items() if name != SIGMOID_BIAS}
    write_checkpoint(output, kept, checkpoint)
    return len(kept)


def export(file: str, output: str, precision: Precision) -> tuple[int, dict[str, str]]:
    """Writes the weights of a checkpoint as safetensors; returns how many tensors, and the metadata."""
    refuse_inputs(output, [file], suffix=".safetensors")
    checkpoint = read_checkpoint(file, mapped=True)
    _refuse_bases("--output", output, [checkpoint])
    tensors = in_precision(checkpoint, precision)
    about = metadata(checkpoint)
    write_safetensors(output, tensors, about)
    return len(tensors), about


def average(inputs: Sequence[str], output: str) -> int:
    """Writes the mean of several checkpoints, as `mean` has it; returns how many tensors."""
    refuse_inputs(output, inputs)
    # Mapped: of each file only the tensor in use is in memory. Adapters are merged: the mean of products is not the
    # product of means.
    checkpoints = [read_checkpoint(file, mapped=True) for file in inputs]
    _refuse_bases("--output", output, checkpoints)
    tensors = mean(checkpoints)
    write_checkpoint(output, tensors, checkpoints[-1])
    return len(tensors)


def convert(source: Path, target: Path, kind: str, precision: Precision) -> int:
    """Writes the model of `source` in another form; returns how many tensors.

    kind: "pt", "safetensors", "transformers" or "sentence-transformers". Raises ConfigError when writing `target` would
    replace `source`, a folder that holds it, or a file of it.
    """
    files.refuse_inputs("TARGET", target, [source, source.with_name(hf.CONFIG_FILE)])
    if os.path.isdir(source) and source.resolve() in target.resolve().parents:
        raise ConfigError(f"TARGET {target}: is inside {source}, which is read; give another path")
    if target.resolve() in source.resolve().parents:
        raise ConfigError(f"TARGET {target}: holds {source}, which is read; give another path")
    checkpoint = read_checkpoint(source, mapped=True)
    _refuse_bases("TARGET", target, [checkpoint])
    model = whole(checkpoint, precision)
    if kind in ("pt", "safetensors"):
        write_file(target, kind, model)
    else:
        write_folder(target, kind, model)
    return len(model.state_dict)


def _refuse_bases(flag: str, output: str | Path, read: Sequence[Checkpoint]) -> None:
    """Raises ConfigError when writing `output` would replace the base of adapters."""
    files.refuse_inputs(flag, output, [checkpoint.base_path for checkpoint in read])


# --- in memory


def in_precision(checkpoint: Checkpoint, precision: Precision) -> dict[str, Tensor]:
    """The weights as they are, all in float32, or in float16 where Chinese-CLIP's published files are.

    Raises CheckpointError when a weight is too large for float16, or the file is of no known architecture.
    """
    if precision == "keep":
        return checkpoint.state_dict
    if precision == "fp32":
        return {
            name: value.float() if value.is_floating_point() else value for name, value in checkpoint.state_dict.items()
        }
    model = build(infer_config(checkpoint), checkpoint)
    convert_weights(model)
    tensors = model.state_dict()
    for name, value in tensors.items():
        if not value.isfinite().all() and checkpoint.state_dict[name].isfinite().all():
            raise CheckpointError(
                f"{name} holds values too large for float16; use --precision fp32", at=checkpoint.path
            )
    return tensors


def describe(file: str) -> dict[str, Any]:
    """All that `info` prints, ready for JSON; sizes in bytes, types with the number of tensors.

    Raises CheckpointError when the file cannot be read.
    """
    checkpoint = read_checkpoint(file, merge_lora=False, mapped=True)
    adapters = {name: value for name, value in checkpoint.state_dict.items() if is_adapter(name)}
    weights = {name: value for name, value in checkpoint.state_dict.items() if name not in adapters}
    types = Counter(type_name(value.dtype) for value in weights.values())
    held = checkpoint.state_dict if checkpoint.base is None else trained(checkpoint.state_dict)
    name = checkpoint.extra.get("name")
    try:
        config = infer_config(checkpoint)
        vision, text = zoo.tower_names(config)
        known = {"resolution": config.vision.image_resolution, "config": config.info()}
        architecture: dict[str, Any] = {"vision_model": vision, "text_model": text, **known}
    except CheckpointError as error:
        architecture = dict.fromkeys(("vision_model", "text_model", "resolution", "config"))
        architecture["unknown"] = str(error).removeprefix(f"{checkpoint.path}: ")
    return {
        "file": str(checkpoint.path),
        **architecture,
        "num_params": num_parameters(weights),
        "num_lora_params": num_parameters(adapters),
        "dtypes": dict(types.most_common()),
        "name": name if isinstance(name, str) else None,
        "epoch": checkpoint.epoch,
        "step": checkpoint.step,
        "optimizer": checkpoint.optimizer is not None,
        "resume": "resume" in checkpoint.extra,
        "lora": checkpoint.lora.entry() if checkpoint.lora else None,
        "base": checkpoint.base.entry() if checkpoint.base else None,
        "bytes": file_bytes(checkpoint.path),
        "weight_bytes": num_bytes(held),
        "optimizer_bytes": num_bytes(checkpoint.optimizer),
    }


def mean(checkpoints: Sequence[Checkpoint]) -> dict[str, Tensor]:
    """The mean of each tensor, summed in float64, in the widest of its types; tensors of whole numbers from the last.

    Raises CheckpointError naming the first tensor that is missing in one file or has another shape there.
    """
    first, *others = checkpoints
    last = others[-1].state_dict
    sums = {name: value.double() for name, value in first.state_dict.items() if value.is_floating_point()}
    types = {name: first.state_dict[name].dtype for name in sums}
    for other in tqdm(others, unit="file", disable=None):
        check_same_tensors(first, other)
        for name, total in sums.items():
            total += other.state_dict[name]
            types[name] = torch.promote_types(types[name], other.state_dict[name].dtype)
    means = {name: (total / (1 + len(others))).to(types[name]) for name, total in sums.items()}
    return {name: means.get(name, last[name]) for name in last}


def metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """What the file says of itself; the towers only where they have a name."""
    about = {"format": "pt", "cn_clip": __version__, "name": str(checkpoint.extra.get("name", checkpoint.path.stem))}
    about |= {"epoch": str(checkpoint.epoch), "step": str(checkpoint.step)}
    try:
        towers = dict(zip(("vision_model", "text_model"), zoo.tower_names(infer_config(checkpoint)), strict=True))
    except CheckpointError:  # weights of another kind: nothing is known of them
        return about
    return about | {kind: name for kind, name in towers.items() if name}


def num_parameters(tensors: dict[str, Tensor]) -> int:
    """Values that training can change: all but the statistics of batch normalisation."""
    return sum(value.numel() for name, value in tensors.items() if not name.endswith(BUFFERS))


def num_bytes(content: object) -> int:
    """Bytes of all tensors in a nested structure of any depth; what is in it several times counts once."""
    total, seen, waiting = 0, set(), [content]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:  # a file from elsewhere may hold a list that holds itself
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            total += item.numel() * item.element_size()
        elif isinstance(item, dict | list | tuple):
            waiting += item.values() if isinstance(item, dict) else item
    return total


def file_bytes(path: str | Path) -> int:
    """Size of a weight file, or of all files in a folder."""
    path = Path(path)
    files = [file for file in path.iterdir() if file.is_file()] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def type_name(dtype: torch.dtype) -> str:
    """`float16` of `torch.float16`."""
    return str(dtype).removeprefix("torch.")


# --- one form as another


def whole(checkpoint: Checkpoint, precision: Precision) -> Checkpoint:
    """The same with the tensors of its model, all of them, in the order of Chinese-CLIP, and its architecture.

    Raises CheckpointError when one is missing, or something does not belong to the model; only the bias of the sigmoid
    loss is left out, because similarity does not use it.
    """
    config = infer_config(checkpoint)
    shapes = {name: value.to("meta") for name, value in checkpoint.state_dict.items()}
    expected = build(config, replace(checkpoint, state_dict=shapes)).state_dict()
    fitted = fit(checkpoint.state_dict, expected, checkpoint.path)
    ordered = replace(checkpoint, state_dict={name: fitted[name] for name in expected})
    return replace(ordered, state_dict=in_precision(ordered, precision))


def write_file(target: Path, kind: str, model: Checkpoint) -> None:
    """The .pt or .safetensors; raises CheckpointError when its reader would take the model for another one."""
    if model.config is not None:
        told, shown = model.config.info(), infer_config(replace(model, config=None)).info()
        lost = next((name for name in _UNSEEN if told.get(name) != shown.get(name)), None)
        if lost is not None:
            raise CheckpointError(
                f"{lost} is {told.get(lost)}, which a file of weights cannot say; keep a folder (--to transformers)",
                at=model.path,
            )
    if kind == "pt":
        write_checkpoint(target, model.state_dict, model)
    else:
        write_safetensors(target, model.state_dict, metadata(model))


def write_folder(target: Path, kind: str, model: Checkpoint) -> None:
    """The folder, in one piece; raises ConfigError for a model that transformers cannot hold."""
    write = write_transformers if kind == "transformers" else write_sentence_transformers
    try:
        with staged_folder(target) as folder:
            write(folder, model.state_dict, infer_config(model))
    except ConfigError as error:
        raise ConfigError(f"{error}; a .pt or .safetensors can hold it", at=model.path) from error


# --- folders of transformers and sentence-transformers

PROCESSOR = "ChineseCLIPProcessor"
PAD, MASK = "[PAD]", "[MASK]"

# Since sentence-transformers 5.4 its Transformer asks a model of two towers for the features of each.
_MODULES = (
    ("", "sentence_transformers.base.modules.transformer.Transformer"),
    ("1_Normalize", "sentence_transformers.sentence_transformer.modules.Normalize"),
)
# Without it sentence-transformers takes the model for one of texts only.
_FEATURES = {
    "transformer_task": "feature-extraction",
    "modality_config": {
        kind: {"method": f"get_{kind}_features", "method_output_name": "pooler_output"} for kind in ("text", "image")
    },
    "module_output_name": "sentence_embedding",
}
_PROCESSOR_FIELDS = {
    "image_processor_type": "ChineseCLIPImageProcessor",
    "processor_class": PROCESSOR,
    "do_convert_rgb": True,
}
# All that transformers asks for.
_METADATA = {"format": "pt"}


def write_transformers(folder: Path, tensors: Mapping[str, Tensor], config: ModelConfig) -> None:
    """A ChineseCLIPModel with its processor, into an existing folder; `tensors` under this package's names.

    The same model gives the same bytes.
    Raises ConfigError for a model that transformers cannot hold, CheckpointError when a file cannot be written.
    """
    fields = hf.fields_of_config(config)
    tokenizer = tokenizer_json(config.text.vocab_size)
    _write_json(folder / hf.CONFIG_FILE, fields)
    _write_json(folder / PICTURE_FILE, _PROCESSOR_FIELDS | picture_fields(config.vision.image_resolution))
    _write_json(folder / "tokenizer.json", tokenizer)
    _write_json(folder / "tokenizer_config.json", TOKENIZER_FIELDS)
    shutil.copyfile(VOCAB_FILE, folder / "vocab.txt")
    write_safetensors(folder / hf.WEIGHT_FILES[0], hf.from_reference(tensors), _METADATA)


def write_sentence_transformers(folder: Path, tensors: Mapping[str, Tensor], config: ModelConfig) -> None:
    """The same, and what makes it a SentenceTransformer that gives unit rows for texts and pictures; raises alike."""
    write_transformers(folder, tensors, config)
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": kind} for number, (path, kind) in enumerate(_MODULES)
    ]
    _write_json(folder / "modules.json", modules)
    _write_json(folder / "sentence_bert_config.json", _FEATURES)
    _write_json(
        folder / "config_sentence_transformers.json",
        {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine", "prompts": {}},
    )
    (folder / "1_Normalize").mkdir()
    _write_json(folder / "1_Normalize" / "config.json", {"module_input_name": "sentence_embedding"})


TOKENIZER_FIELDS: dict[str, Any] = {
    "tokenizer_class": "BertTokenizer",
    "processor_class": PROCESSOR,
    "do_lower_case": True,
    "strip_accents": True,
    "tokenize_chinese_chars": True,
    "model_max_length": CONTEXT_LENGTH,
    # A text that holds "[SEP]" holds three words, not the separator.
    "split_special_tokens": True,
    "unk_token": UNKNOWN,
    "sep_token": END,
    "pad_token": PAD,
    "cls_token": START,
    "mask_token": MASK,
}


def tokenizer_json(vocab_size: int) -> dict[str, Any]:
    """The tokenizer.json of the tokenizers library: the rules of `clip.tokenizer`, [CLS] before and [SEP] behind.

    Raises ConfigError when the model was made for another number of words than the vocabulary has.
    """
    # As transformers reads vocab.txt: it keeps blanks of Unicode around a word.
    words = VOCAB_FILE.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    if len(words) != vocab_size:
        raise ConfigError(f"the text tower knows {vocab_size} words, but this package's vocabulary has {len(words)}")
    vocab = {word: number for number, word in enumerate(words)}
    content: dict[str, Any] = json.loads(Tokenizer().rust.to_str())
    content["model"]["vocab"] = vocab
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = sorted((vocab[word], word) for word in (PAD, UNKNOWN, START, END, MASK))
    content["added_tokens"] = [{"id": number, "content": word, **plain} for number, word in special]
    start, end = ({"SpecialToken": {"id": word, "type_id": 0}} for word in (START, END))
    single = [start, {"Sequence": {"id": "A", "type_id": 0}}, end]
    second = [{"Sequence": {"id": "B", "type_id": 1}}, {"SpecialToken": {"id": END, "type_id": 1}}]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, *second],
        "special_tokens": {word: {"id": word, "ids": [vocab[word]], "tokens": [word]} for word in (START, END)},
    }
    content["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    return content


def _write_json(path: Path, content: object) -> None:
    with atomic_write(path) as stream:
        json.dump(content, stream, ensure_ascii=False, indent=2)
        stream.write("\n")
