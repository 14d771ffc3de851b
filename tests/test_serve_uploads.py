"""What people upload to the page is bounded on the disk, in sum."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from cn_clip.serve.schemas import RefusalError

pytest.importorskip("python_multipart")  # comes with gradio
from cn_clip.serve import uploads as module
from cn_clip.serve.uploads import MAX_AGE, Uploads, bytes_on_disk, delete_older, held_folder

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


# --- reading


@pytest.fixture
def readable(tmp_path: Path) -> Uploads:
    """A folder of uploads with all that no upload is, and files beside it; the largest has 100 bytes."""
    folder, outside = tmp_path / "uploads", tmp_path / "secret"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "picture.png").write_bytes(b"picture")
    outside.write_bytes(b"secret")
    (tmp_path / "uploads-of-others").mkdir()
    (tmp_path / "uploads-of-others" / "x").write_bytes(b"secret")
    (folder / "a" / "link").symlink_to(outside)
    (folder / "a" / "inner-link").symlink_to(folder / "a" / "picture.png")
    (folder / "linked").symlink_to(tmp_path)
    (folder / "a" / "hard").hardlink_to(outside)
    (folder / "a" / "zero").symlink_to("/dev/zero")
    os.mkfifo(folder / "a" / "pipe")
    (folder / "a" / "large").write_bytes(bytes(101))
    with (folder / "a" / "sparse").open("wb") as stream:
        stream.truncate(1 << 40)
    return Uploads(folder, most_bytes=MIB, largest=100)


NO_UPLOADS = [
    *("a/link", "a/inner-link", "linked/secret", "linked", "a/hard", "a/zero", "a/pipe", "a/large", "a/sparse"),
    *("", ".", "a", "a/", "a/none", "none/picture.png", "a/picture.png/x", "../secret", "a/../../secret"),
    *("a/../a/picture.png", "../uploads-of-others/x", "\0", "a/\0", "a/\ud800", "a/" * 1000 + "x", "x" * 5000),
]


@pytest.mark.parametrize("name", NO_UPLOADS, ids=lambda name: ascii(name)[:30])
def test_what_is_no_upload_is_refused_alike(readable: Uploads, name: str) -> None:
    descriptors = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
    with pytest.raises(RefusalError, match="no path or address") as caught:
        readable.read(f"{readable.folder}/{name}")
    assert (caught.value.status, caught.value.code) == (400, "no_upload")
    assert descriptors is None or len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize(
    "path",
    [
        *("/etc/passwd", "/proc/self/environ", "/proc/self/fd/0", "/dev/zero", "/dev/stdin", "/", "a/picture.png"),
        *("", "~", "file:///etc/passwd", "http://example.com/a.png", None, 7, ["/etc/passwd"], {"path": "x"}, b"/etc"),
    ],
    ids=ascii,
)
def test_what_is_not_below_the_folder_is_refused(readable: Uploads, path: object) -> None:
    with pytest.raises(RefusalError, match="no path or address"):
        readable.read(path)


def test_an_upload_is_read_and_one_that_was_deleted_or_grew_is_refused(
    readable: Uploads, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = readable.folder / "a" / "picture.png"
    assert readable.read(str(path)) == b"picture"
    assert readable.read(f"{readable.folder}//a/./picture.png") == b"picture"
    facts = os.stat(path)
    path.write_bytes(bytes(101))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", lambda _: facts)
        with pytest.raises(RefusalError, match="no path or address"):
            readable.read(str(path))
    path.unlink()
    with pytest.raises(RefusalError, match="no path or address"):
        readable.read(str(path))


# --- the folder of a server that was killed

_HOLDER = """
import time
from cn_clip.serve.uploads import held_folder
folder = held_folder()
(folder.path / "picture.png").write_bytes(b"x")
print(folder.path, flush=True)
time.sleep(600)
"""


def test_the_uploads_of_a_server_that_was_killed_are_deleted_by_the_next_and_of_one_that_runs_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "cn-clip-page-made-just-now").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            theirs = Path(process.stdout.readline().strip())
            held_folder().remove()
            assert (theirs / "picture.png").exists()
            process.send_signal(signal.SIGKILL)
            process.wait(60)
        finally:
            process.kill()
    folder = held_folder()
    assert not theirs.parent.exists()
    assert folder.path.stat().st_mode & 0o077 == 0
    folder.remove()
    assert [one.name for one in tmp_path.iterdir()] == ["cn-clip-page-made-just-now"]
