"""Small videos of plain colours, made by av; the files of phones and cameras in small."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def write_video(
    path: Path,
    scenes: Sequence[tuple[int, int, int] | Image.Image],
    *,
    codec: str = "mpeg4",
    size: tuple[int, int] = (64, 48),
    fps: int = 8,
    key_every: int = 8,
    rotation: int = 0,
    aspect: Fraction | None = None,
    tags: Mapping[str, str] | None = None,
) -> Path:
    """A second of each scene, a colour or a picture, with a white quarter at the upper left of a colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options={"movflags": "use_metadata_tags"} if tags else {}) as container:
        container.metadata.update(tags or {})
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = key_every
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation:
            if not hasattr(av.VideoStream, "set_display_rotation"):
                pytest.skip("this version of av writes no rotation")
            stream.set_display_rotation(rotation)
        if codec == "mpeg4":  # a key frame at the given interval only, not where a scene changes
            stream.codec_context.options = {"sc_threshold": "1000000000"}
        for number in range(len(scenes) * fps):
            frame = av.VideoFrame.from_ndarray(_pixels(scenes[number // fps], size), format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_sound(path: Path) -> Path:
    """A video file without a video: half a second of silence."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        stream.layout = "mono"
        for number in range(4):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 8000, number * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _pixels(
    scene: tuple[int, int, int] | Image.Image, size: tuple[int, int]
) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    if isinstance(scene, Image.Image):
        return np.asarray(scene.convert("RGB").resize(size))
    width, height = size
    picture = np.full((height, width, 3), scene, dtype=np.uint8)
    picture[: height // 2, : width // 2] = 255
    return picture
