"""The words in a picture, read by RapidOCR, whose package brings its models: nothing is fetched."""

import logging
import queue
import threading
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cn_clip import extras
from cn_clip.clip.thumbnails import on_white
from cn_clip.clip.transforms import in_8_bits
from cn_clip.errors import DataError
from cn_clip.language import both
from cn_clip.processes import usable_cores

logger = logging.getLogger(__name__)

# A picture is read at this longest side: a page of a book stays legible.
LONGEST_SIDE = 1280
MAX_CHARS = 2000
# No letter has fewer pixels; and no line of them is so much longer than high that this bound cuts it.
LEAST_SIDE = 8
# Each engine has a core and some 300 MB; more threads wait for one.
MOST_ENGINES = 4
_SETTINGS = {
    "Global.log_level": "critical",
    # Its own way is to make the shorter side 736: a picture of 3000 x 2 pixels would become one of a million by 736.
    "Det.limit_type": "max",
    "Det.limit_side_len": LONGEST_SIDE,
    "EngineConfig.onnxruntime.intra_op_num_threads": 1,
    "EngineConfig.onnxruntime.inter_op_num_threads": 1,
}


class Reader:
    """Reads the words of pictures; several threads may do so at once."""

    def __init__(self) -> None:
        """Raises MissingExtraError without the packages, DataError without their models."""
        purpose = "reading the words in pictures"
        extras.require("onnxruntime", extra="ocr", purpose=purpose)
        # It makes a logger of its own, whose handler writes to standard error.
        self._package = extras.require("rapidocr", extra="ocr", purpose=purpose)
        models = Path(str(self._package.__file__)).parent / "models"
        if len(list(models.glob("*.onnx"))) < 3:  # it would download them
            raise DataError("the models of rapidocr are not in its package; install it again", at=models)
        self._free: queue.LifoQueue[Any] = queue.LifoQueue()
        self._unmade, self._lock = min(MOST_ENGINES, usable_cores()), threading.Lock()

    def read(self, image: Image.Image) -> str:
        """The words of an upright picture on one line, as they are read from top to bottom; "" for none."""
        small = in_8_bits(image).copy()
        small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        if min(small.size) < LEAST_SIDE:
            return ""
        engine = self._taken()
        try:
            found = engine(np.ascontiguousarray(np.asarray(on_white(small))[:, :, ::-1]))
        except Exception as error:  # of OpenCV, ONNX Runtime and others, on shapes that they do not expect
            sides = " x ".join(map(str, small.size))
            in_english = f"the words of a picture of {sides} pixels are not read ({error})"
            logger.warning("%s", both(f"{sides} 像素的图片里的文字没有读出（{error}）", in_english))
            return ""
        finally:
            self._free.put(engine)
        return " ".join(" ".join(getattr(found, "txts", None) or ()).split())[:MAX_CHARS]

    def _taken(self) -> Any:
        with self._lock:
            if self._free.empty() and self._unmade:
                made = self._package.RapidOCR(params=dict(_SETTINGS))
                self._unmade -= 1  # only now: threads that wait for an engine would wait for ever
                return made
        return self._free.get()
