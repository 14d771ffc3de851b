"""Transformers folders of several families with random weights, and their tokenizers, made without a network."""

import io
import json
from pathlib import Path
from typing import Any

import torch

from cn_clip.clip.tokenizer import VOCAB_FILE
from cn_clip.clip.transforms import MEAN, STD

KINDS = ("clip", "siglip", "siglip_2", "altclip", "metaclip_2", "chinese_clip")
RESOLUTION = 32
EMBED_DIM = 24

_CHINESE = ["小猫", "小狗", "红色的苹果", "一张图片", "笑脸", "太阳", "月亮", "星星", "汽车", "飞机"]
_WORDS = [*_CHINESE, "cat", "dog", "apple", "smile", "sun", "a", "photo", "of", "the"]
_TOWER = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
_VISION = {**_TOWER, "image_size": RESOLUTION, "patch_size": 8, "projection_dim": EMBED_DIM}
_CROPPED = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": RESOLUTION},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": RESOLUTION, "width": RESOLUTION},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": MEAN,
    "image_std": STD,
    "do_convert_rgb": True,
}
_SQUEEZED = {
    **{name: value for name, value in _CROPPED.items() if "crop" not in name},
    "size": {"height": RESOLUTION, "width": RESOLUTION},
}
PROCESSORS: dict[str, dict[str, Any]] = {
    "clip": _CROPPED,
    "altclip": _CROPPED,
    "metaclip_2": _CROPPED,
    "siglip": {
        **_SQUEEZED,
        "image_processor_type": "SiglipImageProcessor",
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    },
    "chinese_clip": {**_SQUEEZED, "image_processor_type": "ChineseCLIPImageProcessor", "do_center_crop": False},
}
# Of a fixed resolution, SigLIP 2 is the model of SigLIP with another tokenizer.
PROCESSORS["siglip_2"] = PROCESSORS["siglip"]


def write_family(folder: Path, kind: str, *, seed: int = 0, safe: bool = True) -> Path:
    """A folder as `save_pretrained` leaves it, of a model of some ten thousand parameters; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = _TOKENIZERS[kind](folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _model(kind, vocabulary).eval()
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    if not safe:
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    _write_json(folder / "preprocessor_config.json", PROCESSORS[kind])
    return folder


def _model(kind: str, vocabulary: int) -> Any:
    import transformers as hf

    text: dict[str, Any] = {**_TOWER, "vocab_size": vocabulary, "projection_dim": EMBED_DIM}
    both = {"vision_config": _VISION, "projection_dim": EMBED_DIM}
    if kind == "clip":
        text |= {"max_position_embeddings": 77, "bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1}
        return hf.CLIPModel(hf.CLIPConfig(text_config=text, **both))
    if kind in ("siglip", "siglip_2"):
        text |= {"max_position_embeddings": 64, "pad_token_id": 1, "eos_token_id": 1}
        return hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=_VISION))
    if kind == "altclip":
        text |= {"max_position_embeddings": 40, "pad_token_id": 1, "project_dim": 28}
        return hf.AltCLIPModel(hf.AltCLIPConfig(text_config=text, **both))
    if kind == "metaclip_2":
        text |= {"max_position_embeddings": 77, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
        return hf.MetaClip2Model(hf.MetaClip2Config(text_config=text, **both))
    return hf.ChineseCLIPModel(hf.ChineseCLIPConfig(text_config={**text, "max_position_embeddings": 64}, **both))


def _clip_tokenizer(folder: Path) -> int:
    """Byte-level BPE without a merge: every byte is a token, at the end of a word another."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    characters = [chr(byte) for byte in visible] + [chr(256 + number) for number in range(len(hidden))]
    tokens = [*characters, *(f"{one}</w>" for one in characters), "<|startoftext|>", "<|endoftext|>"]
    _write_json(folder / "vocab.json", {token: number for number, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77})
    return len(tokens)


def _siglip_tokenizer(folder: Path) -> int:
    import sentencepiece

    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_WORDS * 4),
        model_writer=stream,
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        character_coverage=1.0,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(stream.getvalue())
    settings = {"tokenizer_class": "SiglipTokenizer", "model_max_length": 64, "model_input_names": ["input_ids"]}
    special = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    _write_json(folder / "tokenizer_config.json", settings | special)
    return int(sentencepiece.SentencePieceProcessor(model_proto=stream.getvalue()).vocab_size())


def _gemma_tokenizer(folder: Path) -> int:
    """As the published folders of SigLIP 2 have it: BPE that keeps upper case, and no merge here."""
    from tokenizers import Tokenizer, normalizers
    from tokenizers.models import BPE
    from tokenizers.processors import TemplateProcessing

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    characters = sorted(set("▁ABCDPabcdefghijklmnopqrstuvwxyz“”" + "".join(_WORDS)))
    pieces = [*special, *characters, *(f"<0x{byte:02X}>" for byte in range(256))]
    numbers = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(BPE(numbers, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "GemmaTokenizer", "padding_side": "right", "model_input_names": ["input_ids"]}
    _write_json(folder / "tokenizer_config.json", settings | names)
    return len(pieces)


def _roberta_tokenizer(folder: Path) -> int:
    """Characters as tokens, among the special tokens of XLM-R: <s> 0, <pad> 1, </s> 2, <unk> 3."""
    from tokenizers import Tokenizer
    from tokenizers.models import Unigram
    from tokenizers.processors import TemplateProcessing

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = [*special, *sorted(set(" ".join(_WORDS)))]
    tokenizer = Tokenizer(Unigram([(piece, -1.0) for piece in pieces], unk_id=3))
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 77}
    _write_json(folder / "tokenizer_config.json", settings | names)
    return len(pieces)


def _bert_tokenizer(folder: Path) -> int:
    (folder / "vocab.txt").write_bytes(VOCAB_FILE.read_bytes())
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "model_max_length": 52})
    return len(VOCAB_FILE.read_text(encoding="utf-8").splitlines())


_TOKENIZERS = {
    "clip": _clip_tokenizer,
    "siglip": _siglip_tokenizer,
    "siglip_2": _gemma_tokenizer,
    "altclip": _roberta_tokenizer,
    "metaclip_2": _roberta_tokenizer,
    "chinese_clip": _bert_tokenizer,
}


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
