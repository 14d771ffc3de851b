"""A transform that does to its process what a hostile picture may do; in a module that a process imports quickly."""

import os
import signal

from PIL.Image import Image

from cn_clip.clip.backends.base import Pixels
from cn_clip.clip.transforms import ImageTransform

SPINS, DIES, EATS, STOPS = range(20, 24)


class Harmful(ImageTransform):
    """What it does is chosen by the width of the picture."""

    def array(self, image: Image, out: Pixels | None = None) -> Pixels:
        while image.width == SPINS:
            pass
        if image.width == DIES:
            os.kill(os.getpid(), signal.SIGSEGV)
        if image.width == EATS:
            bytearray(1 << 40)
        if image.width == STOPS:
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().array(image, out)
