"""Names of models of other families: `hf:FOLDER` and `open_clip:ARCHITECTURE@FILE`; needs no PyTorch."""

import os
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias, get_args

from cn_clip.errors import CheckpointError, ConfigError

Scheme: TypeAlias = Literal["hf", "open_clip"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
FORMS = "hf:FOLDER or open_clip:ARCHITECTURE@FILE"


class ForeignName(NamedTuple):
    """source: a folder or a hub id, perhaps with @REVISION (hf), a weight file or a tag (open_clip).

    architecture: of open_clip, with `:TAG` behind it where a file takes its pictures as the weights of that tag do.
    """

    scheme: Scheme
    source: str
    architecture: str = ""

    def __str__(self) -> str:
        return f"{self.scheme}:{self.architecture}{'@' if self.architecture else ''}{self.source}"


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
    if scheme == "hf" and rest:
        return ForeignName("hf", rest)
    architecture, _, source = rest.partition("@")
    if scheme == "open_clip" and architecture and source:
        return ForeignName("open_clip", source, architecture)
    raise ConfigError(f"model {name!r}: expected {FORMS}")


def check(name: str, backend: str) -> None:
    """Raises ConfigError for an incomplete name, or a backend that does not run such models."""
    parsed = parse(name)
    if backend != "torch":
        raise ConfigError(f"backend: {backend} runs Chinese-CLIP alone; {parsed.scheme} models run in torch")


def absolute(name: str) -> str:
    """The name with a local path from the root on, for those who open it from another folder."""
    parsed = parse(name)
    path = Path(parsed.source).expanduser()
    return str(parsed._replace(source=str(path.absolute()))) if os.path.exists(path) else name
