"""Transformers folders of several families with random weights, and their tokenizers, made without a network."""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cn_clip.clip.families import fg_clip_2
from cn_clip.clip.tokenizer import VOCAB_FILE
from cn_clip.clip.transforms import MEAN, STD

KINDS = (
    "clip",
    "siglip",
    "siglip_2",
    "siglip_2_naflex",
    "fg_clip_2",
    "tips_2",
    "altclip",
    "metaclip_2",
    "chinese_clip",
)
# Those whose pictures keep their proportions.
PATCHED = ("siglip_2_naflex", "fg_clip_2")
PATCH_SIZE = {"siglip_2_naflex": 8, "fg_clip_2": 16}

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
_PATCHES = {"image_processor_type": "Siglip2ImageProcessor", "do_resize": True, "resample": 2, "max_num_patches": 24}
PROCESSORS["siglip_2_naflex"] = {**_PATCHES, "patch_size": 8}
PROCESSORS["fg_clip_2"] = {**_PATCHES, "patch_size": 16, "max_num_patches": 256}
PROCESSORS["tips_2"] = {
    "image_processor_type": "Tipsv2ImageProcessor",
    "size": {"height": RESOLUTION, "width": RESOLUTION},
    "resample": 2,
    "do_normalize": False,
}


@dataclass(frozen=True)
class Sizes:
    """Of a model: what its configs of vision and text say instead of the tiny ones.

    noise: added to the weights as they are initialised, so that the rows of inputs differ.
    """

    vision: Mapping[str, int] = field(default_factory=dict)
    text: Mapping[str, int] = field(default_factory=dict)
    embed_dim: int = EMBED_DIM
    resolution: int = RESOLUTION
    noise: float = 0.2


def write_family(folder: Path, kind: str, *, seed: int = 0, safe: bool = True, sizes: Sizes | None = None) -> Path:
    """A folder as `save_pretrained` leaves it, of some ten thousand parameters unless `sizes` are given; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, sizes = _TOKENIZERS[kind](folder), sizes or Sizes()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _model(kind, vocabulary, sizes).eval()
        for parameter in model.parameters():
            parameter.data += sizes.noise * torch.randn_like(parameter)
    model.save_pretrained(folder)
    if kind == "fg_clip_2":
        _rename_as_published(folder)
    if not safe:
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    side = dict.fromkeys(("height", "width", "shortest_edge"), sizes.resolution)
    processor = {
        name: {one: side[one] for one in value} if isinstance(value, dict) else value
        for name, value in PROCESSORS[kind].items()
    }
    _write_json(folder / "preprocessor_config.json", processor)
    return folder


# --- folders in the form of other packages

_OPEN_CLIP_VISION = {"image_size": RESOLUTION, "layers": 2, "width": 64, "patch_size": 8}
_OPEN_CLIP_TEXT = {"width": 64, "heads": 1, "layers": 2}
OPEN_CLIP_KINDS = ("open_clip_clip", "open_clip_siglip_2")
SENTENCE_KINDS = ("st_clip", "st_embedding_gemma_2")
_HALVES = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}


def write_open_clip(folder: Path, kind: str) -> Path:
    """A folder as open_clip leaves it on the hub; returns it."""
    import open_clip
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    model: dict[str, Any] = {"embed_dim": EMBED_DIM, "vision_cfg": _OPEN_CLIP_VISION}
    if kind == "open_clip_siglip_2":
        text = {**_OPEN_CLIP_TEXT, "context_length": 64, "vocab_size": _gemma_tokenizer(folder), "pool_type": "last"}
        text |= {"hf_tokenizer_name": "timm/ViT-B-16-SigLIP2", "tokenizer_kwargs": {"clean": "canonicalize"}}
        model |= {"custom_text": True, "text_cfg": {**text, "no_causal_mask": True, "proj_bias": True}}
    else:
        model["text_cfg"] = {**_OPEN_CLIP_TEXT, "context_length": 24, "vocab_size": 49408}
    _write_json(folder / "open_clip_config.json", {"model_cfg": model, "preprocess_cfg": _HALVES})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    tensors = {name: value.contiguous() for name, value in made.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors")
    return folder


def write_sentence_transformers(folder: Path, kind: str) -> Path:
    """A folder as sentence-transformers leaves it, of a model of texts and pictures that has a prompt; returns it."""
    modules = ["base.modules.transformer.Transformer"]
    if kind == "st_embedding_gemma_2":
        features = _write_embedding_gemma(folder)
        modules += ["sentence_transformer.modules.Pooling", "sentence_transformer.modules.Normalize"]
    else:
        features = _write_clip_of_sentences(folder)
    listed = [
        {"idx": at, "name": str(at), "path": f"{at}_" if at else "", "type": f"sentence_transformers.{module}"}
        for at, module in enumerate(modules)
    ]
    _write_json(folder / "modules.json", listed)
    _write_json(folder / "sentence_bert_config.json", {"transformer_task": "feature-extraction", **features})
    prompts = {"prompts": {"query": "query: ", "document": ""}, "similarity_fn_name": "cosine"}
    _write_json(folder / "config_sentence_transformers.json", {**prompts, "model_type": "SentenceTransformer"})
    return folder


def _write_clip_of_sentences(folder: Path) -> dict[str, Any]:
    write_family(folder, "clip")
    for file in ("preprocessor_config.json", "tokenizer_config.json"):
        content = json.loads((folder / file).read_text(encoding="utf-8"))
        _write_json(folder / file, {**content, "processor_class": "CLIPProcessor"})
    methods = {
        one: {"method": f"get_{one}_features", "method_output_name": "pooler_output"} for one in ("text", "image")
    }
    return {"module_output_name": "sentence_embedding", "modality_config": methods}


def _write_embedding_gemma(folder: Path) -> dict[str, Any]:
    """EmbeddingGemma 2: one tower of words, to which a tower of patches gives pictures as words."""
    import transformers as hf
    from tokenizers import Tokenizer
    from tokenizers.models import Unigram
    from tokenizers.processors import TemplateProcessing

    folder.mkdir(parents=True)
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<img>", "<boi>", "<eoi>", "<aud>", "<boa>", "<eoa>", "<|video|>"]
    pieces = [*special, *sorted(set("▁: abcdefghijklmnopqrstuvwxyz“”" + "".join(_WORDS)))]
    tokenizer = Tokenizer(Unigram([(piece, -1.0) for piece in pieces], unk_id=3))
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)])
    names = {"image_token": 4, "boi_token": 5, "eoi_token": 6, "audio_token": 7, "boa_token": 8, "eoa_token": 9}
    words = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        extra_special_tokens={name: special[number] for name, number in names.items()},
    )
    heads = {**_TOWER, "head_dim": 16, "num_key_value_heads": 2}
    text = {**heads, "num_key_value_heads": 1, "global_head_dim": 16, "hidden_size_per_layer_input": 8}
    text |= {"vocab_size": len(pieces), "embedding_dim": EMBED_DIM, "max_position_embeddings": 2048}
    vision = {**heads, "model_type": "gemma4_vision", "patch_size": 16, "position_embedding_size": 64}
    ids = {("eoa_token_index" if name == "eoa_token" else f"{name}_id"): number for name, number in names.items()}
    config = hf.EmbeddingGemma2Config(
        text_config={**text, "layer_types": ["sliding_attention", "full_attention"]},
        vision_config=vision,
        audio_config=None,
        video_token_id=10,
        **ids,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.EmbeddingGemma2Model(config).eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    template = (
        "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<img>"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    processor = hf.EmbeddingGemma2Processor(
        feature_extractor=hf.Gemma4AudioFeatureExtractor(),
        image_processor=hf.Gemma4ImageProcessorPil(max_soft_tokens=70),
        tokenizer=words,
        video_processor=hf.EmbeddingGemma2VideoProcessor(),
        chat_template=template,
    )
    processor.save_pretrained(folder)
    for number in (1, 2):
        (folder / f"{number}_").mkdir()
    _write_json(folder / "1_" / "config.json", {"embedding_dimension": EMBED_DIM, "pooling_mode": "mean"})
    forward = {"method": "forward", "method_output_name": "last_hidden_state"}
    modalities = {"text": forward, "image": forward, "message": {**forward, "format": "structured"}}
    return {"module_output_name": "token_embeddings", "modality_config": modalities}


def _model(kind: str, vocabulary: int, sizes: Sizes) -> Any:
    import transformers as hf

    width = {"projection_dim": sizes.embed_dim}
    text: dict[str, Any] = {**_TOWER, "vocab_size": vocabulary, **width, **sizes.text}
    whole = {**_VISION, **width, "image_size": sizes.resolution, **sizes.vision}
    both = {"vision_config": whole, **width}
    if kind == "clip":
        text |= {"max_position_embeddings": 77, "bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1}
        return hf.CLIPModel(hf.CLIPConfig(text_config=text, **both))
    if kind in ("siglip", "siglip_2"):
        text |= {"max_position_embeddings": 64, "pad_token_id": 1, "eos_token_id": 1}
        return hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=whole))
    if kind in PATCHED:
        vision = {**_TOWER, "patch_size": PATCH_SIZE[kind], "num_patches": 16, **sizes.vision}
        text |= {"max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
        values = {"text_config": text, "vision_config": vision}
        if kind == "siglip_2_naflex":
            return hf.Siglip2Model(hf.Siglip2Config(**values))
        text |= {"longtext_len": 196, "keep_len": 20}
        return fg_clip_2.model_class(hf)(fg_clip_2.read_config(hf, values))
    if kind == "tips_2":
        vision = {name: value for name, value in whole.items() if name not in ("intermediate_size", "projection_dim")}
        return hf.Tipsv2Model(hf.Tipsv2Config(text_config=text, vision_config=vision))
    if kind == "altclip":
        text |= {"max_position_embeddings": 40, "pad_token_id": 1, "project_dim": sizes.embed_dim + 4}
        return hf.AltCLIPModel(hf.AltCLIPConfig(text_config=text, **both))
    if kind == "metaclip_2":
        text |= {"max_position_embeddings": 77, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
        return hf.MetaClip2Model(hf.MetaClip2Config(text_config=text, **both))
    return hf.ChineseCLIPModel(hf.ChineseCLIPConfig(text_config={**text, "max_position_embeddings": 64}, **both))


def _rename_as_published(folder: Path) -> None:
    """The config and the further weights of a folder of FG-CLIP 2, which has code of its own beside them."""
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    _write_json(folder / "config.json", {**config, "model_type": "fgclip2", "architectures": ["x"], "auto_map": auto})
    (folder / "evil.py").write_text("raise SystemExit('code of a folder was run')\n", encoding="utf-8")
    tensors = load_file(folder / "model.safetensors")
    tensors |= {"dense_feature_head.probe": torch.zeros(1, 1, 32), "boxtext_head.bias": torch.zeros(32)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _tips_tokenizer(folder: Path) -> int:
    """Characters as tokens, with nothing around them."""
    import transformers

    pieces = ["<pad>", "<unk>", *sorted(set("▁abcdefghijklmnopqrstuvwxyz“”" + "".join(_WORDS)))]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    transformers.Tipsv2Tokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    return len(vocabulary)


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
    "siglip_2_naflex": _gemma_tokenizer,
    "fg_clip_2": _gemma_tokenizer,
    "tips_2": _tips_tokenizer,
    "altclip": _roberta_tokenizer,
    "metaclip_2": _roberta_tokenizer,
    "chinese_clip": _bert_tokenizer,
}


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
