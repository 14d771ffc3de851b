"""One model in every form: a .pt, a .safetensors, and the folders that (sentence-)transformers open.

`cn-clip convert`, `Encoder.save` and `Encoder.push_to_hub` write them.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from cn_clip import __version__, zoo
from cn_clip.clip.loading import build
from cn_clip.clip.model import convert_weights
from cn_clip.clip.tokenizer import CONTEXT_LENGTH, END, START, UNKNOWN, VOCAB_FILE, Tokenizer
from cn_clip.clip.weights import hf
from cn_clip.clip.weights.checkpoint import Checkpoint, fit, infer_config
from cn_clip.clip.weights.form_names import CARD_FILE, CARD_MARK
from cn_clip.clip.weights.hf import PICTURE_FILE, picture_fields
from cn_clip.clip.weights.writing import write_checkpoint, write_safetensors
from cn_clip.errors import CheckpointError, ConfigError
from cn_clip.files import atomic_write, staged_folder
from cn_clip.zoo import ModelConfig

Precision = Literal["keep", "fp16", "fp32"]
# What leaves a trace in features but none in the names and shapes of tensors.
_UNSEEN = ("image_resolution", "vision_head_width", "text_num_attention_heads", "text_hidden_act")


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
            raise CheckpointError(f"{name} holds values too large for float16; use fp32", at=checkpoint.path)
    return tensors


def metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """What the file says of itself; the towers only where they have a name."""
    about = {"format": "pt", "cn_clip": __version__, "name": str(checkpoint.extra.get("name", checkpoint.path.stem))}
    about |= {"epoch": str(checkpoint.epoch), "step": str(checkpoint.step)}
    about |= {"matryoshka": json.dumps(checkpoint.matryoshka)} if checkpoint.matryoshka else {}
    try:
        towers = dict(zip(("vision_model", "text_model"), zoo.tower_names(infer_config(checkpoint)), strict=True))
    except CheckpointError:  # weights of another kind: nothing is known of them
        return about
    return about | {kind: name for kind, name in towers.items() if name}


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
                f"{lost} is {told.get(lost)}, which a file of weights cannot say; keep a folder of transformers",
                at=model.path,
            )
    if kind == "pt":
        write_checkpoint(target, model.state_dict, model)
    else:
        write_safetensors(target, model.state_dict, metadata(model))


def write_folder(target: Path, kind: str, model: Checkpoint) -> None:
    """The folder, in one piece; raises ConfigError for a model that transformers cannot hold."""
    try:
        with staged_folder(target) as folder:
            if kind == "transformers":
                write_transformers(folder, model.state_dict, infer_config(model))
            else:
                write_sentence_transformers(folder, model.state_dict, infer_config(model), _published(model.path))
    except ConfigError as error:
        raise ConfigError(f"{error}; a .pt or .safetensors can hold it", at=model.path) from error


def _published(path: Path) -> str | None:
    """The repository that a file was downloaded from, by its name."""
    found = (one.huggingface for one in zoo.downloadable().values() if one.filename == path.name)
    return next(found, None)


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
PROCESSOR_FIELDS = {
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
    write_json(folder / hf.CONFIG_FILE, fields)
    write_json(folder / PICTURE_FILE, PROCESSOR_FIELDS | picture_fields(config.vision.image_resolution))
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer_config.json", TOKENIZER_FIELDS)
    shutil.copyfile(VOCAB_FILE, folder / "vocab.txt")
    write_safetensors(folder / hf.WEIGHT_FILES[0], hf.from_reference(tensors), _METADATA)


def write_sentence_transformers(
    folder: Path, tensors: Mapping[str, Tensor], config: ModelConfig, base: str | None = None
) -> None:
    """The same, and what makes it a SentenceTransformer that gives unit rows for texts and pictures; raises alike.

    base: the repository on Hugging Face that the weights are from.
    """
    write_transformers(folder, tensors, config)
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": kind} for number, (path, kind) in enumerate(_MODULES)
    ]
    write_json(folder / "modules.json", modules)
    write_json(folder / "sentence_bert_config.json", _FEATURES)
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "similarity_fn_name": "cosine",
            "prompts": {"query": "", "document": ""},
            "default_prompt_name": None,
        },
    )
    with atomic_write(folder / CARD_FILE) as stream:
        stream.write(model_card(folder.name, folder.name, base))
    (folder / "1_Normalize").mkdir()
    write_json(folder / "1_Normalize" / "config.json", {"module_input_name": "sentence_embedding"})


# What the page of a hub says of a model, and what MTEB reads there: its language, and what it comes from.
_CARD = """---
library_name: sentence-transformers
pipeline_tag: zero-shot-image-classification
language: zh
tags: [sentence-transformers, feature-extraction, sentence-similarity, chinese-clip, clip]
{base}---

# {name}

<!-- {mark} -->

```python
from cn_clip import Encoder

encoder = Encoder("{address}")
encoder.classify(["a.jpg"], ["猫", "狗"])
```

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{address}")
model.encode(["一只猫"])
```
"""


def model_card(name: str, address: str, base: str | None = None) -> str:
    """A README.md; address: what opens the model. base: the repository on Hugging Face that the weights are from."""
    return _CARD.format(name=name, address=address, mark=CARD_MARK, base=f"base_model: {base}\n" if base else "")


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


def write_json(path: Path, content: object) -> None:
    """Writes a JSON file for people too: indented, in UTF-8, whole or not at all."""
    with atomic_write(path) as stream:
        json.dump(content, stream, ensure_ascii=False, indent=2)
        stream.write("\n")
