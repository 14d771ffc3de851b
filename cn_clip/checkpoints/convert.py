"""Weights of one form as another: `cn-clip convert epoch3.pt my-model --to transformers`, and back.

Also the folders that Immich and transformers.js open, and vectors of an index as the folders of clip-retrieval.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cn_clip import command
from cn_clip.clip.weights.form_names import SUFFIXES, Kind, VectorKind, require_room
from cn_clip.clip.weights.hub import weight_file
from cn_clip.errors import ConfigError
from cn_clip.language import both, counted
from cn_clip.option_types import Json, WeightType

# How a form is opened, for the last line of what is printed.
OPENED_BY = {
    "transformers": "transformers.ChineseCLIPModel.from_pretrained({!r})",
    "sentence-transformers": "sentence_transformers.SentenceTransformer({!r})",
    "safetensors": "cn_clip.clip.load_from_name({!r})",
    "pt": "cn_clip.clip.load_from_name({!r})",
    "transformers-js": "await ChineseCLIPModel.from_pretrained({!r})  // @huggingface/transformers",
}


@dataclass(frozen=True)
class Options:
    """Writes a model as Chinese-CLIP's .pt, as .safetensors, or as a folder for (sentence-)transformers.

    Weights stay the same bits unless --precision says otherwise; adapters (LoRA) are merged, the optimizer is left out.

    immich, transformers-js: a folder of ONNX files, which compute in float32 unless --precision is fp16; for
    transformers.js they also come in int8, as its dtype q8, unless --precision names another.

    clip-retrieval: the vectors of an index or a feature file, as its folders img_emb, text_emb and metadata; in float16
    with --precision fp16. `index build` reads such a folder.
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """A checkpoint, safetensors file or transformers folder, or the name of a model; for clip-retrieval: an index or
    a feature file"""
    target: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TARGET")]
    """The file or folder to write; it appears whole or not at all"""
    to: Kind | VectorKind | None = None
    """The form; default: pt or safetensors by the suffix of TARGET, transformers for a name without one"""
    precision: WeightType = "keep"
    overwrite: bool = False
    """Replace what is at TARGET"""
    json: Json = False


def run(options: Options) -> None:
    """Writes the file or folder; raises a CnClipError, and leaves what is at TARGET as it was, when it cannot."""
    target, kind = Path(options.target), kind_of(options.target, options.to)
    require_room(target, kind, overwrite=options.overwrite, otherwise="give --overwrite or choose another TARGET")

    say = command.Speaker(quiet=options.json)
    if kind == "clip-retrieval":
        _write_vectors(options, target, say)
        return

    from cn_clip.checkpoints import weights

    path = weight_file(options.source)
    num_tensors = weights.convert(path, target, kind, options.precision)
    size = weights.file_bytes(target)
    tensors = both(f"{num_tensors} 个张量", counted(num_tensors, "tensor"))
    say(f"{path} -> {target} ({kind}), {tensors}, {size / 2**20:.1f} MiB")
    if kind == "immich":
        say(both("放进 Immich 的模型缓存：docs/conversion.md", "put it into Immich's cache: docs/en/conversion.md"))
    else:
        opened_by = OPENED_BY[kind].format(options.target)
        say(both(f"打开方式：{opened_by}", f"open it with: {opened_by}"))
    say.result({"source": str(path), "target": str(target), "to": kind, "num_tensors": num_tensors, "bytes": size})


def _write_vectors(options: Options, target: Path, say: command.Speaker) -> None:
    from cn_clip.checkpoints import embeddings

    num_rows = embeddings.write(options.source, target, half=options.precision == "fp16")
    rows = both(f"{num_rows} 个向量", counted(num_rows, "vector"))
    say(f"{options.source} -> {target} (clip-retrieval), {rows}")
    opened_by = f"clip-retrieval index --embeddings_folder {options.target} --index_folder INDEX"
    say(both(f"打开方式：{opened_by}", f"open it with: {opened_by}"))
    say.result({"source": options.source, "target": str(target), "to": "clip-retrieval", "num_vectors": num_rows})


def kind_of(target: str, to: Kind | VectorKind | None) -> Kind | VectorKind:
    """The form asked for, else the one that the name tells; raises ConfigError when it tells another or none."""
    suffix = Path(target).suffix
    told = SUFFIXES.get(suffix)
    if not target:
        raise ConfigError("TARGET: expected a path, got an empty one")
    if to is not None:
        if told not in (None, to):
            raise ConfigError(f"TARGET {target}: --to {to} does not go with a name in {suffix}; change one of them")
        return to
    if told is None and suffix and not os.path.isdir(target):
        raise ConfigError(f"TARGET {target}: {suffix} tells no form; give --to, or a name in .pt or .safetensors")
    return told or "transformers"


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
