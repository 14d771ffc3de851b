"""What people upload to the page is bounded on the disk, in sum."""

import asyncio
import contextlib
from pathlib import Path

import pytest

from cn_clip.serve.refusals import RefusalError
from cn_clip.serve.uploads import Uploads, bytes_on_disk

MIB = 1 << 20


def of_four(folder: Path) -> Uploads:
    """Room for four of the largest."""
    return Uploads(folder, most_bytes=4 * MIB, largest=MIB)


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
    blocks = [one.stat().st_blocks for one in (tmp_path / "folder", tmp_path / "folder" / "file")]
    assert bytes_on_disk(tmp_path) == 512 * sum(blocks) >= 512
    assert bytes_on_disk(tmp_path / "absent") == 0
