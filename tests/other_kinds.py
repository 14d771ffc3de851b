"""What people have under the name of a weight file that is none, and what every reader says of it."""

import gzip
import io
import zipfile

import numpy as np


def zipped(**files: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


def arrays() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, a=np.ones(3))
    return stream.getvalue()


# Content, and the beginning of what is said of it behind the path.
OTHER_KINDS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty; download or copy it again"),
    "page": (
        "\n<!DOCTYPE html><html>404 没有</html>".encode(),
        "is a web page, as a hub sends instead of a file; down",
    ),
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "is a git-LFS pointer, not the file itself; run `git lfs pull` in its folder",
    ),
    "json": (b'{"error": "Repository not found"}', "is JSON text; give the weight file that it belongs to"),
    "text": ("Entry not found 没有\n".encode() * 99, "is text, not weights; give the weight file"),
    "gzip": (gzip.compress(b"a"), "is compressed by gzip; unpack it"),
    "tar": (b"a" * 257 + b"ustar" + b"\0" * 300, "is a tar archive; unpack it"),
    "zip": (zipped(readme=b"a"), "is a zip archive that torch.save did not write; unpack it"),
    "npz": (arrays(), "is arrays of NumPy (npz); save the weights with torch.save(model.state_dict(), path)"),
    "hdf5": (
        b"\x89HDF\r\n\x1a\n" + b"\0" * 99,
        "is a file of Keras or TensorFlow (HDF5); convert it to PyTorch's format",
    ),
    "tensorflow": (
        b"\0" * 99 + bytes.fromhex("57fb808b247547db"),
        "is a TensorFlow checkpoint; convert it to PyTorch's format",
    ),
}
