"""Small datasets for tests: pictures as bytes, tsv and jsonl files, and commands run as users type them."""

import base64
import io
import json
import os
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import warm_python
from PIL import Image

from cn_clip.clip import tokenizer
from cn_clip.clip.backends.base import TokenIds

REPOSITORY = Path(__file__).parents[1]
GOLDEN_LMDB = REPOSITORY / "tests" / "golden" / "lmdb_reference"


def picture(colour: tuple[int, ...] = (255, 0, 0), *, kind: str = "PNG", size: tuple[int, int] = (5, 4)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, kind)
    return stream.getvalue()


def tsv_line(image_id: object, data: bytes | None = None) -> bytes:
    return f"{image_id}\t".encode() + base64.b64encode(picture() if data is None else data) + b"\n"


def jsonl_line(text_id: object, text: object = "红色", image_ids: object = ()) -> bytes:
    record = {"text_id": text_id, "text": text, "image_ids": list(image_ids)}  # type: ignore[call-overload]
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def write_split(folder: Path, images: Iterable[bytes], texts: Iterable[bytes], *, split: str = "train") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}_imgs.tsv").write_bytes(b"".join(images))
    (folder / f"{split}_texts.jsonl").write_bytes(b"".join(texts))


def run_script(script: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [warm_python.program(), f"cn_clip/{script}", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60)


@dataclass(frozen=True)
class CodePoints:
    """Stands in for a text transform: the code points of a text are its ids."""

    context_length: int = 52

    def rows(self, texts: Sequence[str]) -> list[list[int]]:
        return [[ord(character) for character in text][: self.context_length] for text in texts]

    def pad(self, rows: Sequence[Sequence[int]]) -> TokenIds:
        return tokenizer.pad(rows, self.context_length)


def tree(folder: Path) -> dict[str, Any]:
    """Relative path -> bytes of every file, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
