"""What people upload to the page is bounded on the disk, in sum."""

import asyncio
import contextlib
import os
import threading
import time
from pathlib import Path

import pytest

from cn_clip.serve import uploads as module
from cn_clip.serve.refusals import RefusalError
from cn_clip.serve.uploads import MAX_AGE, Uploads, bytes_on_disk, delete_older

MIB = 1 << 20
# Three blocks: see `uploads`.
OVERHEAD = 3 * 4096


def of_four(folder: Path) -> Uploads:
    """Room for four of the largest."""
    return Uploads(folder, most_bytes=4 * MIB, largest=MIB - OVERHEAD)


def uploaded(folder: Path, name: str, data: bytes, *, age: float = 0) -> None:
    """As Gradio stores it: in a folder of its own."""
    path = folder / name / "picture.png"
    path.parent.mkdir()
    path.write_bytes(data)
    os.utime(path, (time.time() - age,) * 2)


def test_what_is_full_is_refused_until_files_are_deleted(tmp_path: Path) -> None:
    async def uploading() -> None:
        uploads = of_four(tmp_path)
        for number in range(4):
            async with uploads.one_more():
                (tmp_path / str(number)).write_bytes(bytes(MIB))
        with pytest.raises(RefusalError, match="take up their 4 MiB") as caught:
            async with uploads.one_more():
                raise AssertionError("no room")
        assert (caught.value.status, caught.value.code, caught.value.retry_after) == (503, "uploads_full", 60)
        (tmp_path / "0").unlink()
        async with uploads.one_more():
            pass

    asyncio.run(uploading())


def test_small_uploads_are_charged_with_what_they_took(tmp_path: Path) -> None:
    async def uploading() -> None:
        uploads = of_four(tmp_path)
        for number in range(100):
            async with uploads.one_more():
                (tmp_path / str(number)).write_bytes(b"small")

    asyncio.run(uploading())
    assert len(list(tmp_path.iterdir())) == 100


def test_those_that_are_being_written_count_as_the_largest(tmp_path: Path) -> None:
    async def uploading() -> None:
        uploads = of_four(tmp_path)
        async with contextlib.AsyncExitStack() as writing:
            for _ in range(4):
                await writing.enter_async_context(uploads.one_more())
            with pytest.raises(RefusalError, match="take up"):
                await writing.enter_async_context(uploads.one_more())
        async with uploads.one_more():
            pass

    asyncio.run(uploading())


def test_tiny_files_count_with_their_blocks_and_folders(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"x")
    (tmp_path / "folder" / "empty").touch()
    (tmp_path / "folder" / "large").write_bytes(bytes(MIB + 1))
    assert bytes_on_disk(tmp_path) == 4096 + 4096 + 4096 + MIB + 4096
    assert bytes_on_disk(tmp_path / "absent") == 0


def test_what_is_old_is_deleted_with_its_folder_and_nothing_is_left_of_it(tmp_path: Path) -> None:
    uploaded(tmp_path, "old", b"x", age=MAX_AGE + 60)
    uploaded(tmp_path, "new", b"y", age=MAX_AGE - 60)
    (tmp_path / "unfinished").write_bytes(b"z")
    os.utime(tmp_path / "unfinished", (0, 0))

    asyncio.run(of_four(tmp_path).sweep())
    assert sorted(one.name for one in tmp_path.rglob("*")) == ["new", "picture.png"]
    delete_older(tmp_path, time.time() + 1)
    assert tmp_path.exists()
    assert bytes_on_disk(tmp_path) == 0


def test_one_more_finds_room_where_the_old_was(tmp_path: Path) -> None:
    for number in range(4):
        uploaded(tmp_path, str(number), bytes(MIB), age=MAX_AGE + 60)

    async def uploading() -> None:
        uploads = of_four(tmp_path)
        uploads._charged = uploads.most_bytes
        async with uploads.one_more():
            assert list(tmp_path.iterdir()) == []

    asyncio.run(uploading())


def test_nothing_is_deleted_while_an_upload_is_written(tmp_path: Path) -> None:
    uploaded(tmp_path, "old", b"x", age=MAX_AGE + 60)

    async def uploading() -> None:
        uploads = of_four(tmp_path)
        async with uploads.one_more():
            sweeping = asyncio.ensure_future(uploads.sweep())
            await asyncio.sleep(0.05)
            assert (tmp_path / "old").exists()
            # As where there is no room for one more.
            await uploads._measure()
            assert (tmp_path / "old").exists()
        await sweeping
        assert not (tmp_path / "old").exists()

    asyncio.run(uploading())


def test_a_client_that_leaves_does_not_let_others_write_into_what_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, going = threading.Event(), threading.Event()

    def slow(*_: object) -> None:
        begun.set()
        assert going.wait(60)

    monkeypatch.setattr(module, "delete_older", slow)

    async def uploading() -> None:
        uploads = of_four(tmp_path)
        leaving = asyncio.ensure_future(uploads.sweep())
        await asyncio.to_thread(begun.wait, 60)
        leaving.cancel()
        await asyncio.sleep(0.05)
        assert uploads._admission.locked()
        going.set()
        await asyncio.wait((leaving,))
        assert leaving.cancelled()
        async with uploads.one_more():
            pass

    asyncio.run(uploading())


def test_sweeping_goes_on_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = iter([OSError("no such device"), None, asyncio.CancelledError()])
    swept: list[bool] = []

    async def sweep(_: Uploads) -> None:
        swept.append(True)
        if (outcome := next(outcomes)) is not None:
            raise outcome

    monkeypatch.setattr(Uploads, "sweep", sweep)
    monkeypatch.setattr(module, "SWEEP_SECONDS", 0)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(of_four(tmp_path).keep_sweeping())
    assert len(swept) == 3


def test_tiny_uploads_stay_below_the_bound(tmp_path: Path) -> None:
    async def uploading() -> int:
        uploads = of_four(tmp_path)
        for number in range(1000):
            try:
                async with uploads.one_more():
                    uploaded(tmp_path, str(number), b"")
            except RefusalError:
                return number
        raise AssertionError("never full")

    number = asyncio.run(uploading())
    # Of two blocks each, until there is no room for another of the largest.
    assert number == pytest.approx(3 * MIB / 8192, abs=2)
    assert bytes_on_disk(tmp_path) <= 4 * MIB
