"""Pictures from paths, bytes or PIL, decoded by threads while the batch before is computed."""

import io
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from cn_clip.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

Picture: TypeAlias = "str | Path | bytes | Image"
T = TypeVar("T")

# Batches that are decoded, or being decoded, before the one in use is done.
BATCHES_AHEAD = 2


def open_picture(picture: Picture, *, name: str) -> "Image":
    """A loaded PIL picture from a path, encoded bytes, or PIL itself.

    Raises DataError saying `name` when it cannot be decoded, TypeError for any other kind of object.
    """
    from PIL.Image import DecompressionBombError, Image
    from PIL.Image import open as open_file

    if not isinstance(picture, (str, Path, bytes, Image)):
        raise TypeError(f"{name}: expected a path, bytes or a PIL picture, got {type(picture).__name__}")
    try:
        if isinstance(picture, Image):
            picture.load()
            return picture
        image: Image
        with open_file(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
            image.load()
        return image
    except (OSError, SyntaxError, ValueError, DecompressionBombError) as error:
        raise DataError(f"{name}: not a picture that can be decoded ({error})") from error


def decoded_batches(load: Callable[[int], T], count: int, batch_size: int, num_threads: int) -> Iterator[list[T]]:
    """`load(0)` to `load(count - 1)` in lists of `batch_size`, the last one shorter, loaded ahead by threads.

    PIL decodes and scales without Python's global lock, so threads do what processes would. num_threads 0: loads in
    this thread. An error of `load` comes out at its place.
    """
    starts = range(0, count, batch_size)
    if num_threads == 0:
        for start in starts:
            yield [load(number) for number in range(start, min(start + batch_size, count))]
        return
    waiting: deque[list[Future[T]]] = deque()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="decode") as pool:
        try:
            for start in starts:
                waiting.append([pool.submit(load, number) for number in range(start, min(start + batch_size, count))])
                if len(waiting) > BATCHES_AHEAD:
                    yield [future.result() for future in waiting.popleft()]
            while waiting:
                yield [future.result() for future in waiting.popleft()]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
