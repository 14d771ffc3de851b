"""Processes that decode pictures of strangers: what one picture does to its process, no other picture notices."""

import asyncio
import io
import os
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import harmful_pictures as harmful
import httpx
import numpy as np
import picture_bombs as bombs
import pytest
from harmful_pictures import Harmful
from PIL import Image
from serving import WatchedBackend, data_url, harmed, queue_depth, served, wait_until

from cn_clip.clip.backends.base import PixelType
from cn_clip.clip.encoder import Encoder
from cn_clip.clip.picture_files import Head, look
from cn_clip.clip.pictures import decode
from cn_clip.clip.transforms import ImageTransform, PictureTransform
from cn_clip.serve import pictures as module
from cn_clip.serve import runner as runner_module
from cn_clip.serve.batching import Metrics
from cn_clip.serve.limits import Limits
from cn_clip.serve.pictures import Decoders, EncodedPicture, picture_bytes
from cn_clip.serve.runner import GIVEN_WAY, Picture, Runner
from cn_clip.serve.schemas import RefusalError

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals")
HAS_PROC = Path("/proc/self/environ").exists()


def encoded(width: int = 9, height: int = 8, kind: str = "PNG", mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((width, height), 64).convert(mode).save(stream, kind)
    return stream.getvalue()


def picture(data: bytes) -> EncodedPicture:
    head = look(data)
    assert head is not None
    return EncodedPicture(data, head, "input")


def decoding(
    work: Callable[[Decoders], Awaitable[object]],
    transform: PictureTransform | None = None,
    limits: Limits | None = None,
    *,
    count: int = 1,
    pixel_type: PixelType = "float32",
) -> None:
    async def main() -> None:
        decoders = Decoders(count, limits or Limits())
        try:
            await decoders.open(transform or Harmful(8), pixel_type)
            await work(decoders)
        finally:
            decoders.close()

    asyncio.run(main())


@pytest.mark.parametrize(("decode_mode", "pixel_type"), [("exact", "float32"), ("fast", "float32"), ("fast", "uint8")])
def test_the_pixels_are_those_of_this_process(decode_mode: str, pixel_type: PixelType) -> None:
    transform = ImageTransform(32, decode_mode)  # type: ignore[arg-type]
    files = [
        encoded(300, 200, "JPEG"),
        encoded(40, 30, "PNG", "P"),
        encoded(40, 30, "WEBP", "RGBA"),
        encoded(40, 30, "GIF", "P"),
    ]

    async def work(decoders: Decoders) -> None:
        for data in files:
            expected = (transform.array if pixel_type == "float32" else transform.bytes)(
                decode(data, transform.draft_size)
            )
            found = await decoders.pixels(picture(data))
            assert found.dtype == pixel_type
            np.testing.assert_array_equal(found, expected)

    decoding(work, transform, pixel_type=pixel_type)


@pytest.mark.parametrize(
    ("width", "reason"),
    [
        (harmful.SPINS, "takes more than the 0.5 seconds"),
        (harmful.DIES, "its decoder ended with status -11"),
        pytest.param(
            harmful.EATS, "takes too much memory", marks=pytest.mark.skipif(not HAS_PROC, reason="needs /proc")
        ),
        (harmful.STOPS, "takes more than the 0.5 seconds"),
    ],
)
def test_a_picture_that_harms_its_process_is_refused_and_the_next_is_decoded(
    width: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DECODE_SECONDS", 0.5)
    pids = set()

    async def work(decoders: Decoders) -> None:
        (worker,) = decoders._workers
        for _ in range(2):
            with pytest.raises(RefusalError, match=f"input: the picture does not decode .*{reason}") as caught:
                await decoders.pixels(picture(encoded(width)))
            assert (caught.value.status, caught.value.code) == (400, "invalid_image")
            assert (await decoders.pixels(picture(encoded()))).shape == (3, 8, 8)
            assert worker.process.child is not None
            pids.add(worker.process.child.pid)
        decoders.check_moving(asyncio.get_running_loop().time())

    # A process that stands still is killed after the time of a request.
    decoding(work, limits=Limits(timeout=1.5))
    assert not HAS_PROC or not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_file_of_more_pixels_than_it_declared_is_not_decoded() -> None:
    async def work(decoders: Decoders) -> None:
        with pytest.raises(RefusalError, match="at most 100 pixels a picture are read, this one has 40 x 30") as caught:
            await decoders.pixels(EncodedPicture(encoded(40, 30), Head("PNG", 1, 1), "input"))
        assert caught.value.code == "image_too_large"

    decoding(work, limits=Limits(max_pixels=100))


def test_one_who_leaves_lets_the_others_go_on() -> None:
    async def work(decoders: Decoders) -> None:
        leaving = asyncio.ensure_future(decoders.pixels(picture(encoded(600, 600))))
        await asyncio.sleep(0)
        leaving.cancel()
        assert (await decoders.pixels(picture(encoded()))).shape == (3, 8, 8)
        while len(decoders._idle) < 2:
            await asyncio.sleep(0.01)

    decoding(work, count=2)


def test_without_a_process_it_is_said_so_until_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        decoders, loop = Decoders(1, Limits()), asyncio.get_running_loop()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", "/nonexistent/python")
            await decoders.open(Harmful(8))
            with pytest.raises(RefusalError, match="no process can be started") as caught:
                await decoders.pixels(picture(encoded()))
            assert (caught.value.status, caught.value.code) == (503, "decoders_unavailable")
            with pytest.raises(RefusalError, match="no process can be started"):
                decoders.check_moving(loop.time())
        for _ in range(600):
            try:
                decoders.check_moving(loop.time())
                break
            except RefusalError:
                await asyncio.sleep(0.05)
        assert (await decoders.pixels(picture(encoded()))).shape == (3, 8, 8)
        decoders.close()
        # After its end no process is left running, whoever asks for one.
        assert decoders._workers[0].start() is not None
        decoders.close()

    asyncio.run(main())


def test_decoders_that_stand_still_are_seen() -> None:
    async def work(decoders: Decoders) -> None:
        now = asyncio.get_running_loop().time()
        waiting = asyncio.ensure_future(decoders.pixels(picture(encoded(harmful.STOPS))))
        await asyncio.sleep(0)
        decoders.check_moving(now + 30)
        with pytest.raises(RefusalError, match="no picture has been decoded for a long time"):
            decoders.check_moving(now + 61)
        decoders.kill()
        with pytest.raises(RefusalError, match="is stopping"):
            await waiting

    decoding(work)


@pytest.mark.skipif(not HAS_PROC, reason="needs /proc")
def test_a_process_knows_no_key_and_has_less_claim_to_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CN_CLIP_API_KEY", "secret")

    async def work(decoders: Decoders) -> None:
        (worker,) = decoders._workers
        assert worker.process.child is not None
        process = Path(f"/proc/{worker.process.child.pid}")
        assert b"CN_CLIP_API_KEY" not in (process / "environ").read_bytes()
        assert os.getpriority(os.PRIO_PROCESS, worker.process.child.pid) > os.getpriority(os.PRIO_PROCESS, 0)
        # SIGTERM and SIGINT reach all of a group, and the server answers what is in hand before it ends.
        os.kill(worker.process.child.pid, 15)
        os.kill(worker.process.child.pid, 2)
        assert (await decoders.pixels(picture(encoded()))).shape == (3, 8, 8)

    decoding(work)


# --- through the service


def test_texts_do_not_stand_behind_pictures_that_are_not_decoded() -> None:
    with served(harmed(WatchedBackend()), Limits(timeout=10)) as address, ThreadPoolExecutor() as pool:

        def ask(given: object) -> httpx.Response:
            return httpx.post(f"{address}/v1/embeddings", json={"model": "tiny", "input": given}, timeout=120)

        stuck = [{"image": data_url(encoded(harmful.STOPS))}] * 16
        waiting = pool.submit(ask, stuck)
        wait_until(lambda: queue_depth(address, "pictures") == 16)
        for text in ("猫", "猫" * 1000):
            assert ask(text).status_code == 200
        assert not waiting.done()
        assert httpx.get(f"{address}/readyz").status_code == 200


def test_texts_that_wait_go_before_the_base64_of_a_long_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(runner_module, "time", SimpleNamespace(sleep=slept.append))

    async def main() -> None:
        runner = Runner("tiny", lambda: Encoder(WatchedBackend()), Limits(), Metrics())
        long = Picture(data_url(encoded() + bytes(1_000_000)), "input")
        runner._looked_at([long])
        assert slept == []
        with runner._text_slots.taken(1):
            runner._looked_at([Picture(data_url(encoded()), "input")])
            assert slept == []
            (file,) = runner._looked_at([long])
        assert len(file.data) > 1_000_000
        await runner.stop()

    asyncio.run(main())
    assert slept == [GIVEN_WAY] * 5


def test_a_bomb_is_refused_by_its_first_bytes() -> None:
    given_way: list[None] = []
    for data in (bombs.gif_comment(1_600_000), bombs.jpeg_exif_pieces(30_000)):
        with pytest.raises(RefusalError, match=r"input: the picture does not decode .*with more than") as caught:
            picture_bytes(data_url(data), "input", lambda: given_way.append(None))
        assert (caught.value.code, given_way) == ("invalid_image", [])
    honest = encoded(900, 700, "JPEG") + bytes(1_000_000)
    assert picture_bytes(data_url(honest), "input") == honest


@pytest.mark.parametrize(
    "make",
    [lambda: bombs.gif_comment(1_600_000), lambda: bombs.gif_comment(7_400_000), lambda: bombs.jpeg_scans(3000)],
    ids=["GIF of 1.6 MB", "GIF of 7.4 MB", "JPEG of 3000 scans"],
)
def test_a_bomb_is_refused_by_name(make: Callable[[], bytes]) -> None:
    with served(Encoder(WatchedBackend())) as address:
        given = {"model": "tiny", "input": {"image": data_url(make())}}
        answer = httpx.post(f"{address}/v1/embeddings", json=given, timeout=120)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_image")
    assert "with more than" in answer.json()["error"]["message"]


def test_a_server_whose_model_does_not_compute_is_not_ready() -> None:
    backend = WatchedBackend()
    with served(Encoder(backend), Limits(timeout=0.2)) as address:
        backend.going.clear()
        asked = httpx.post(f"{address}/v1/embeddings", json={"model": "tiny", "input": "猫"}, timeout=120)
        assert asked.status_code == 504
        answer = httpx.get(f"{address}/readyz")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "stalled")
        assert httpx.get(f"{address}/healthz").status_code == 200
        backend.going.set()
        wait_until(lambda: httpx.get(f"{address}/readyz").status_code == 200)
