"""A model folder of Immich, opened as its machine learning lays it out, by onnxruntime, tokenizers and Pillow alone.

Written from the layout: `config.json`, `textual/` and `visual/`, one text or picture at a time.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

Row = NDArray[np.float32]


class ImmichModel:
    """Vectors of texts and pictures, of the folder of one model."""

    def __init__(self, folder: Path) -> None:
        self.length = int(_json(folder / "config.json")["text_cfg"]["context_length"])
        pad_token = _json(folder / "textual" / "tokenizer_config.json")["pad_token"]
        self.tokenizer = Tokenizer.from_file(str(folder / "textual" / "tokenizer.json"))
        self.tokenizer.enable_truncation(max_length=self.length)
        pad_id = self.tokenizer.token_to_id(pad_token)
        self.tokenizer.enable_padding(length=self.length, pad_token=pad_token, pad_id=pad_id)
        self.pictures = _json(folder / "visual" / "preprocess_cfg.json")
        self.sessions = {
            kind: onnxruntime.InferenceSession(folder / kind / "model.onnx", providers=["CPUExecutionProvider"])
            for kind in ("textual", "visual")
        }

    def text(self, text: str) -> Row:
        """The vector (D,)."""
        ids = self.tokenizer.encode(" ".join(text.split())).ids
        return self._run("textual", {"text": np.array([ids], dtype=np.int32)})

    def picture(self, picture: Image.Image) -> Row:
        """The vector (D,)."""
        about = self.pictures
        assert about["resize_mode"] == "squash"
        height, width = about["size"]
        how = Image.Resampling[about["interpolation"].upper()]
        pixels = np.asarray(picture.convert(about["mode"]).resize((width, height), how), dtype=np.float32) / 255
        pixels = (pixels - np.float32(about["mean"])) / np.float32(about["std"])
        return self._run("visual", {"image": pixels.transpose(2, 0, 1)[None]})

    def _run(self, kind: str, inputs: dict[str, Any]) -> Row:
        row: Row = self.sessions[kind].run(None, inputs)[0][0]
        return row


def _json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
