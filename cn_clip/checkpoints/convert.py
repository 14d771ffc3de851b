"""Weights of one form as another: `cn-clip convert epoch3.pt my-model --to transformers`, and back."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from cn_clip import command
from cn_clip.errors import CheckpointError, CnClipError, ConfigError, DataError
from cn_clip.option_types import Json, WeightType

if TYPE_CHECKING:
    from cn_clip.checkpoints.weights import Precision
    from cn_clip.clip.weights.checkpoint import Checkpoint

Kind = Literal["transformers", "safetensors", "pt", "sentence-transformers"]
FOLDERS = ("transformers", "sentence-transformers")
SUFFIXES: dict[str, Kind] = {".pt": "pt", ".pth": "pt", ".safetensors": "safetensors"}
# How a form is opened, for the last line of what is printed.
OPENED_BY = {
    "transformers": "transformers.ChineseCLIPModel.from_pretrained({!r})",
    "sentence-transformers": "sentence_transformers.SentenceTransformer({!r})",
    "safetensors": "cn_clip.clip.load_from_name({!r})",
    "pt": "cn_clip.clip.load_from_name({!r})",
}
# What a folder of either form holds, folders too; one that holds more is never replaced.
FOLDER_FILES = frozenset(
    {
        *("model.safetensors", "config.json", "preprocessor_config.json"),
        *("vocab.txt", "tokenizer.json", "tokenizer_config.json"),
        *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"),
        *("1_Normalize", "1_Normalize/config.json"),
    }
)
# What leaves a trace in features but none in the names and shapes of tensors.
_UNSEEN = ("image_resolution", "vision_head_width", "text_num_attention_heads", "text_hidden_act")


@dataclass(frozen=True)
class Options:
    """Writes a model as Chinese-CLIP's .pt, as .safetensors, or as a folder for (sentence-)transformers.

    Weights stay the same bits unless --precision says otherwise; adapters (LoRA) are merged, the optimizer is left out.
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """A checkpoint, safetensors file or transformers folder, or the name of a model"""
    target: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TARGET")]
    """The file or folder to write; it appears whole or not at all"""
    to: Kind | None = None
    """The form; default: pt or safetensors by the suffix of TARGET, transformers for a name without one"""
    precision: WeightType = "keep"
    overwrite: bool = False
    """Replace what is at TARGET"""
    json: Json = False


def run(options: Options) -> None:
    """Writes the file or folder; raises a CnClipError, and leaves what is at TARGET as it was, when it cannot."""
    target, kind = Path(options.target), kind_of(options.target, options.to)
    require_room(target, kind, overwrite=options.overwrite)

    from cn_clip.checkpoints.weights import file_bytes
    from cn_clip.clip.weights.checkpoint import read_checkpoint
    from cn_clip.clip.weights.hub import weight_file

    say = command.Speaker(quiet=options.json)
    path = weight_file(options.source)
    refuse_source(target, path)
    model = whole(read_checkpoint(path, mapped=True), options.precision)
    if kind in FOLDERS:
        write_folder(target, kind, model)
    else:
        write_file(target, kind, model)
    size = file_bytes(target)
    say(f"{path} -> {target} ({kind}), {len(model.state_dict)} tensors, {size / 2**20:.1f} MiB")
    say(f"打开 / open: {OPENED_BY[kind].format(options.target)}")
    say.result(
        {"source": str(path), "target": str(target), "to": kind, "num_tensors": len(model.state_dict), "bytes": size}
    )


def kind_of(target: str, to: Kind | None) -> Kind:
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


def require_room(target: Path, kind: Kind, *, overwrite: bool) -> None:
    """Raises DataError for what --overwrite would have to replace, and for what may never be replaced."""
    from cn_clip import files

    if kind not in FOLDERS:
        files.replaceable(target)
    elif os.path.isdir(target):
        inside = (path.relative_to(target).as_posix() for path in target.rglob("*"))
        others = sorted(islice((name for name in inside if name not in FOLDER_FILES), 3))
        if others:
            raise DataError(f"holds other things ({', '.join(others)}); choose a new folder", at=target)
    elif os.path.exists(target):
        raise DataError(f"is a file; expected the name of a folder for --to {kind}", at=target)
    if not overwrite and (any(target.iterdir()) if os.path.isdir(target) else os.path.exists(target)):
        raise DataError("exists; give --overwrite or choose another TARGET", at=target)


def refuse_source(target: Path, source: Path) -> None:
    """Raises ConfigError when writing `target` would replace `source`, a folder that holds it, or a file of it."""
    from cn_clip import files
    from cn_clip.clip.weights.hf import CONFIG_FILE

    files.refuse_inputs("TARGET", target, [source, source.with_name(CONFIG_FILE)])
    if os.path.isdir(source) and source.resolve() in target.resolve().parents:
        raise ConfigError(f"TARGET {target}: is inside {source}, which is read; give another path")
    if target.resolve() in source.resolve().parents:
        raise ConfigError(f"TARGET {target}: holds {source}, which is read; give another path")


def whole(checkpoint: "Checkpoint", precision: "Precision") -> "Checkpoint":
    """The same with the tensors of its model, all of them, in the order of Chinese-CLIP, and its architecture.

    Raises CheckpointError when one is missing, or something does not belong to the model; the bias of the sigmoid loss
    alone is left out, for similarity does not use it.
    """
    from cn_clip.checkpoints.weights import in_precision
    from cn_clip.clip.loading import build
    from cn_clip.clip.weights.checkpoint import fit, infer_config

    config = infer_config(checkpoint)
    shapes = {name: value.to("meta") for name, value in checkpoint.state_dict.items()}
    expected = build(config, replace(checkpoint, state_dict=shapes)).state_dict()
    fitted = fit(checkpoint.state_dict, expected, checkpoint.path)
    ordered = replace(checkpoint, state_dict={name: fitted[name] for name in expected})
    return replace(ordered, state_dict=in_precision(ordered, precision))


def write_file(target: Path, kind: Kind, model: "Checkpoint") -> None:
    """The .pt or .safetensors; raises CheckpointError when its reader would take the model for another one."""
    from cn_clip.checkpoints.export import metadata
    from cn_clip.clip.weights.checkpoint import infer_config
    from cn_clip.clip.weights.writing import write_checkpoint, write_safetensors

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


def write_folder(target: Path, kind: Kind, model: "Checkpoint") -> None:
    """The folder, in one piece; raises ConfigError for a model that transformers cannot hold."""
    from cn_clip.checkpoints import hf_folders
    from cn_clip.clip.weights.checkpoint import infer_config
    from cn_clip.files import staged_folder

    write = hf_folders.write_transformers if kind == "transformers" else hf_folders.write_sentence_transformers
    try:
        with staged_folder(target) as folder:
            write(folder, model.state_dict, infer_config(model))
    except ConfigError as error:
        raise ConfigError(f"{error}; a .pt or .safetensors can hold it", at=model.path) from error
    except OSError as error:
        if isinstance(error, CnClipError):
            raise
        raise DataError(f"cannot be written ({error.strerror})", at=target) from error


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
