"""What a file that is no weight file really is, by its first bytes: every reader of weights says the same of it."""

import json
import os
import zipfile
from pathlib import Path

from cn_clip.errors import CnClipError

_HEAD_BYTES = 1024
_LARGEST_RATIO, _ROOM = 16, 1 << 26
_TENSORFLOW = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"  # the last bytes of a TensorFlow 2 checkpoint's index
_LFS_POINTER = b"version https://git-lfs.github.com/"
_MARKUP = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")

# By first bytes: what a file is, and what to do instead.
_MAGIC = {
    _LFS_POINTER: "a git-LFS pointer, not the file itself; run `git lfs pull` in its folder",
    b"\x1f\x8b": "compressed by gzip; unpack it",
    b"\xfd7zXZ": "compressed by xz; unpack it",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it",
    b"7z\xbc\xaf": "a 7z archive; unpack it",
    b"Rar!": "a rar archive; unpack it",
    b"\x89HDF": "a file of Keras or TensorFlow (HDF5); convert it to PyTorch's format",
    b"\x93NUMPY": "an array of NumPy; save the weights with torch.save(model.state_dict(), path)",
    b"GGUF": "a GGUF file of llama.cpp; give the PyTorch or safetensors file it was made from",
}


def is_safetensors(path: Path) -> bool:
    """Whether the file begins as safetensors do: the length of a JSON object, and its brace."""
    head, size = _head(path), os.path.getsize(path)
    return head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= size - 8


def is_zip(path: Path) -> bool:
    """Whether the file begins as zip files do, which those of torch.save are; it may be cut off."""
    return _head(path).startswith(b"PK\x03\x04")


def most_bytes(path: Path | str | os.PathLike[str]) -> int:
    """How many bytes of memory the arrays in an archive may take: 16 times the file, and 64 MiB.

    Those of torch.save and np.savez are stored as they are; packed zeros could take a thousand times the file.
    """
    return _LARGEST_RATIO * os.path.getsize(path) + _ROOM


def check_unpacked(path: Path | str | os.PathLike[str], error_type: type[CnClipError]) -> None:
    """Raises `error_type` for a zip file whose members would take more memory than `most_bytes` says.

    A file that is no zip, or a damaged one, is left to its reader.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            declared = sum(member.file_size for member in archive.infolist())
    except Exception:
        return
    if declared > most_bytes(path):
        raise error_type(
            f"{path}: has {os.path.getsize(path):,} bytes and would take {declared:,} in memory; refused, for neither "
            "torch.save nor np.savez packs so tightly; if you trust the file, unpack it and save it again"
        )


def what_it_is(path: str | os.PathLike[str]) -> str | None:
    """A sentence that ends in the next step, for a file or folder that cannot be opened; None when it is not known.

    "is a git-LFS pointer, not the file itself; run `git lfs pull` in its folder", to be put behind the path.
    """
    path = Path(path)
    try:
        if not path.is_file():
            return None
        head, size = _head(path), path.stat().st_size
        if not size:
            return "is empty; download or copy it again"
        for magic, what in _MAGIC.items():
            if head.startswith(magic):
                return f"is {what}"
        if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_MARKUP):
            return "is a web page, as a hub sends instead of a file; download the file itself (cn-clip download)"
        found = _json(path, head) or _archive(path, head) or _safetensors(path, head, size)
        if found is None:
            with open(path, "rb") as stream:
                stream.seek(max(0, size - len(_TENSORFLOW)))
                ends_so = stream.read() == _TENSORFLOW
            is_part = ".ckpt" in path.name and (".data-" in path.name or path.suffix == ".meta")
            is_tensorflow = ends_so or is_part
            found = "a TensorFlow checkpoint; convert it to PyTorch's format" if is_tensorflow else _text(head)
    except OSError:  # asked after an error, which says why
        return None
    return None if found is None else f"is {found}"


def _head(path: Path) -> bytes:
    with open(path, "rb") as stream:
        return stream.read(_HEAD_BYTES)


def _json(path: Path, head: bytes) -> str | None:
    if head.lstrip()[:1] not in (b"{", b"["):
        return None
    if path.name.endswith(".index.json"):
        return "the index of a model in several files; give their folder"
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    return "JSON text; give the weight file that it belongs to"


def _archive(path: Path, head: bytes) -> str | None:
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it"
    if not head.startswith(b"PK\x03\x04"):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # whatever a damaged directory makes zipfile stumble over
        return "cut off, or damaged; download or copy it again"
    if all(name.endswith(".npy") for name in names):
        return "arrays of NumPy (npz); save the weights with torch.save(model.state_dict(), path)"
    if not any(name.endswith("/data.pkl") for name in names):
        return "a zip archive that torch.save did not write; unpack it"
    return "a file of torch.save; rename it to .pt" if path.suffix == ".safetensors" else None


def _safetensors(path: Path, head: bytes, size: int) -> str | None:
    length = int.from_bytes(head[:8], "little")
    if head[8:9] != b"{" or length > 1 << 30:
        return None
    cut_off = "safetensors cut off, or damaged; download or copy it again"
    try:
        with open(path, "rb") as stream:
            entries = json.loads(stream.read(8 + length)[8:])
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        return cut_off if 8 + length + max(ends, default=0) != size else None
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return cut_off


def _text(head: bytes) -> str | None:
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3 or not error.start:  # no character cut at the end of the piece
            return None
        text = head[: error.start].decode()
    return (
        "text, not weights; give the weight file"
        if text.isprintable() or text.replace("\n", "").isprintable()
        else None
    )
