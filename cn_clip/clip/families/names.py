"""Names of models of other families: `hf:FOLDER`, `open_clip:ARCHITECTURE@FILE`, `st:FOLDER`; needs no PyTorch."""

import os
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias, get_args

from cn_clip.errors import CheckpointError, ConfigError

Scheme: TypeAlias = Literal["hf", "open_clip", "st"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
# Folders in the form of open_clip: with open_clip_config.json in them.
OPEN_CLIP_FOLDERS = ("local-dir", "hf-hub")
FORMS = "hf:FOLDER, open_clip:ARCHITECTURE@FILE, open_clip:local-dir:FOLDER, open_clip:hf-hub:OWNER/NAME or st:FOLDER"
# What runs the models of each scheme.
BACKENDS: dict[Scheme, tuple[str, ...]] = {
    "hf": ("torch", "onnx", "openvino"),
    "open_clip": ("torch", "onnx", "openvino"),
    "st": ("torch",),
}


class ForeignName(NamedTuple):
    """source: a folder or a hub id, perhaps with @REVISION (hf, st), a weight file or a tag (open_clip).

    architecture: of open_clip, with `:TAG` behind it where a file takes its pictures as the weights of that tag do.
    folder: "local-dir" or "hf-hub" of a folder of open_clip, which has no architecture in its name.
    """

    scheme: Scheme
    source: str
    architecture: str = ""
    folder: str = ""

    def __str__(self) -> str:
        before = f"{self.folder}:" if self.folder else f"{self.architecture}@" if self.architecture else ""
        return f"{self.scheme}:{before}{self.source}"


def is_foreign(name: object) -> bool:
    """Whether a model's name begins as those of other families do."""
    return isinstance(name, str) and name.partition(":")[0] in SCHEMES and ":" in name


def refuse(name: object) -> None:
    """Raises CheckpointError for the name of a model of another family, where only Chinese-CLIP is taken."""
    if is_foreign(name):
        raise CheckpointError(
            "only Chinese-CLIP is taken here; other families are taken by Encoder and cn-clip features, "
            "zeroshot, evaluate, linear-probe, index and serve",
            at=name,
        )


def parse(name: str) -> ForeignName:
    """The parts of a name for which `is_foreign`; raises ConfigError for an incomplete one."""
    scheme, _, rest = name.partition(":")
    if scheme in ("hf", "st") and rest:
        return ForeignName("hf" if scheme == "hf" else "st", rest)
    folder, _, inside = rest.partition(":")
    if scheme == "open_clip" and folder in OPEN_CLIP_FOLDERS and inside:
        return ForeignName("open_clip", inside, folder=folder)
    architecture, _, source = rest.partition("@")
    if scheme == "open_clip" and architecture and source and folder not in OPEN_CLIP_FOLDERS:
        return ForeignName("open_clip", source, architecture)
    raise ConfigError(f"model {name!r}: expected {FORMS}")


def check(name: str, backend: str) -> None:
    """Raises ConfigError for an incomplete name, or a backend that does not run such models."""
    runners = BACKENDS[parse(name).scheme]
    if backend not in runners:
        raise ConfigError(f"backend: {name} runs in {' or '.join(runners)}, got {backend!r}")


def check_trust(name: object) -> None:
    """Raises ConfigError for a model that never runs code of its own, whether or not it is trusted."""
    if not is_foreign(name) or parse(str(name)).scheme != "st":
        raise ConfigError("trust_remote_code: is for st:FOLDER; nothing else runs code that comes with a model")


def absolute(name: str) -> str:
    """The name with a local path from the root on, for those who open it from another folder."""
    parsed = parse(name)
    path = Path(parsed.source).expanduser()
    return str(parsed._replace(source=str(path.absolute()))) if os.path.exists(path) else name
