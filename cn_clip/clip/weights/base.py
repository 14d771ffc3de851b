"""The base of a file that holds only adapters (LoRA): how the file names it, and how it is found again and checked."""

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from torch import Tensor

from cn_clip import zoo
from cn_clip.clip.weights.hub import weight_file

_FINGERPRINT = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Base:
    """name: of a published or bundled model, or an absolute path. fingerprint: of its weights, see `of_weights`."""

    name: str
    fingerprint: str

    @classmethod
    def from_entry(cls, entry: object) -> "Base":
        """From the entry "base" of a checkpoint; raises ValueError when it is not of that form."""
        values = entry if isinstance(entry, dict) else {}
        name, digits = values.get("name"), values.get("fingerprint")
        if not isinstance(name, str) or not 0 < len(name) <= 4096 or "\0" in name:
            name = None
        if name is None or not isinstance(digits, str) or not _FINGERPRINT.fullmatch(digits):
            raise ValueError('the entry "base" is not {"name": n, "fingerprint": 16 hexadecimal digits}')
        return cls(name, digits)

    def entry(self) -> dict[str, str]:
        """The entry "base" of a checkpoint."""
        return {"name": self.name, "fingerprint": self.fingerprint}

    @property
    def file_name(self) -> str:
        """What the base is called where it lies beside the adapters; the path may be one of Windows."""
        known = zoo.named(self.name)
        return known.filename if isinstance(known, zoo.Published) else PureWindowsPath(self.name).name

    def find(self, folder: Path) -> Path | None:
        """The recorded path, else a file or folder of its name in `folder`, else the model of that name; None if gone.

        A relative path is looked for only in `folder`. Raises what `weight_file` does for a published model.
        """
        places = [Path(self.name)] if os.path.isabs(self.name) else []
        if self.file_name not in ("", ".."):
            places.append(folder / self.file_name)
        for place in places:
            if os.path.exists(place):
                return place.absolute()
        return weight_file(self.name) if zoo.named(self.name) else None


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Sixteen hexadecimal digits that tell named tensors, in this order, from others."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in tensors:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def of_weights(tensors: dict[str, Tensor]) -> str:
    """The fingerprint of a base: of its values in float32, whatever type and order its file has; 1 to 3 s a GB."""
    return fingerprint((name, in_float32(tensors[name])) for name in sorted(tensors))


def in_float32(tensor: Tensor) -> Tensor:
    """The tensor as training holds it: numbers with a fraction in float32."""
    return tensor.float() if tensor.is_floating_point() else tensor
