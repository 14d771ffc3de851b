"""Writes the folders that transformers and sentence-transformers open: weights, architecture, pictures and texts."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from cn_clip.clip.tokenizer import CONTEXT_LENGTH, END, START, UNKNOWN, VOCAB_FILE, Tokenizer
from cn_clip.clip.weights import hf
from cn_clip.clip.weights.hf import PICTURE_FILE, picture_fields
from cn_clip.clip.weights.writing import write_safetensors
from cn_clip.errors import ConfigError
from cn_clip.files import atomic_write
from cn_clip.zoo import ModelConfig

PROCESSOR = "ChineseCLIPProcessor"
PAD, MASK = "[PAD]", "[MASK]"

# Since sentence-transformers 5.4 its Transformer asks a model of two towers for the features of each.
_MODULES = (
    ("", "sentence_transformers.base.modules.transformer.Transformer"),
    ("1_Normalize", "sentence_transformers.sentence_transformer.modules.Normalize"),
)


# Left out, sentence-transformers takes the model for one of texts alone.
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
    content["post_processor"] = _frame(vocab)
    content["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    return content


def _frame(vocab: Mapping[str, int]) -> dict[str, Any]:
    def special(word: str, kind: int = 0) -> dict[str, Any]:
        return {"SpecialToken": {"id": word, "type_id": kind}}

    def text(name: str, kind: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": kind}}

    single = [special(START), text("A", 0), special(END)]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, text("B", 1), special(END, 1)],
        "special_tokens": {word: {"id": word, "ids": [vocab[word]], "tokens": [word]} for word in (START, END)},
    }


def _write_json(path: Path, content: object) -> None:
    with atomic_write(path) as stream:
        json.dump(content, stream, ensure_ascii=False, indent=2)
        stream.write("\n")
