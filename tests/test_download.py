"""`cn-clip download`, against a local server that answers as the Hugging Face hub does."""

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from fake_hub import CONTENT, PATH, FakeHub, leftovers, serving

from cn_clip import cli, zoo
from cn_clip.files import Lock

ROOT = Path(__file__).parents[1]
FILE = "clip_cn_rn50.pt"


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Its file is the published RN50."""
    known = replace(zoo.PUBLISHED["RN50"], num_bytes=len(CONTENT), sha256=digest(CONTENT))
    monkeypatch.setitem(zoo.PUBLISHED, "RN50", known)
    with serving(monkeypatch) as fake:
        yield fake


def download(root: Path, *args: str) -> None:
    cli.main(["download", "RN50", "--download-root", str(root), *args])


def refusal(capsys: pytest.CaptureFixture[str], root: Path, *args: str) -> str:
    """The one line on stderr of a command that fails."""
    with pytest.raises(SystemExit) as stopped:
        download(root, *args)
    assert stopped.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    (line,) = lines
    return line


def test_a_download_tells_from_where_to_where_and_that_it_was_checked(
    server: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    download(tmp_path / "new")
    first, last = capsys.readouterr().out.splitlines()
    assert first == f"downloading {server.endpoint}{PATH}"
    path = tmp_path / "new" / FILE
    assert last == f"downloaded: {path} ({len(CONTENT):,} bytes; SHA-256 matches)"
    assert path.read_bytes() == CONTENT
    assert leftovers(tmp_path / "new") == [FILE]


def test_json_is_one_object(server: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = []
    for _ in range(2):
        download(tmp_path, "--json")
        results.append(json.loads(capsys.readouterr().out))
    facts = {"name": "RN50", "path": str(tmp_path / FILE), "num_bytes": len(CONTENT), "checked": True}
    assert results == [{**facts, "downloaded": True}, {**facts, "downloaded": False}]
    assert len(server.gets()) == 1


def test_an_interrupted_download_goes_on_when_run_again(
    server: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.cuts, server.refusals = 1, 10
    assert "try again to go on from there" in refusal(capsys, tmp_path)
    assert not (tmp_path / FILE).exists()
    server.refusals = 0
    download(tmp_path)
    assert (tmp_path / FILE).read_bytes() == CONTENT
    asked = server.gets()[-1]
    assert asked is not None
    assert int(asked.removeprefix("bytes=").rstrip("-")) > 0


def test_a_killed_process_leaves_what_the_next_one_goes_on_from(server: FakeHub, tmp_path: Path) -> None:
    """In processes of their own, with the library's own chunks."""
    server.content = os.urandom(1 << 20) * 24
    server.etag = digest(server.content)
    code = (
        "from dataclasses import replace\nfrom cn_clip import cli, zoo\n"
        f"zoo.PUBLISHED['RN50'] = replace(zoo.PUBLISHED['RN50'], sha256='{server.etag}')\n"
        f"cli.main(['download', 'RN50', '--download-root', {str(tmp_path)!r}])"
    )
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    server.stalls = 1
    killed = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not any(part.stat().st_size for part in tmp_path.glob(".*/*.part")):
        assert killed.poll() is None
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    server.release.set()
    assert not (tmp_path / FILE).exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / FILE).read_bytes() == server.content
    first, second = server.gets()
    assert first is None
    assert second is not None
    assert int(second.removeprefix("bytes=").rstrip("-")) >= 1 << 20
    assert leftovers(tmp_path) == [FILE]


@pytest.mark.parametrize("etag", ["of the right file", "a" * 40])
def test_wrong_bytes_are_refused_and_removed_whatever_the_hub_says_of_them(
    server: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], etag: str
) -> None:
    server.content = b"\1" + CONTENT[1:]
    server.etag = digest(CONTENT) if "right" in etag else etag
    told = f"expected the SHA-256 {digest(CONTENT)}, got {digest(server.content)}; the file was removed"
    assert told in refusal(capsys, tmp_path)
    assert leftovers(tmp_path) == []


def test_a_hub_with_another_file_is_refused_before_the_file_comes(
    server: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.content = CONTENT[::-1]
    server.etag = digest(server.content)
    message = refusal(capsys, tmp_path)
    assert (
        f"at {server.endpoint} is not the file published as OFA-Sys/chinese-clip-rn50: expected the SHA-256" in message
    )
    assert server.gets() == []
    assert leftovers(tmp_path) == []


def test_a_file_put_there_by_hand_is_checked_without_a_network(
    server: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / FILE).write_bytes(CONTENT)
    download(tmp_path, "--offline")
    assert "already here" in capsys.readouterr().out
    (tmp_path / FILE).write_bytes(CONTENT[:-1])
    assert f"{FILE}: is not the published file, whose SHA-256 is {digest(CONTENT)}" in refusal(capsys, tmp_path)
    assert (tmp_path / FILE).read_bytes() == CONTENT[:-1]
    assert server.requests == []


def test_a_file_that_someone_puts_there_meanwhile_is_checked(
    server: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the command has seen that there is none, and before it holds the lock."""
    acquire = Lock.acquire

    def wait(self: Lock) -> bool:
        (tmp_path / FILE).write_bytes(b"not the published file")
        return acquire(self)

    monkeypatch.setattr(Lock, "acquire", wait)
    assert f"{FILE}: is not the published file, whose SHA-256 is" in refusal(capsys, tmp_path)
    assert server.gets() == []


def test_a_folder_whose_name_is_too_long_is_a_sentence(
    server: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "cannot be made a folder (File name too long)" in refusal(capsys, tmp_path / ("x" * 300))


@pytest.mark.parametrize("how", ["--offline", "HF_HUB_OFFLINE is set"])
def test_offline_it_says_what_to_fetch_and_where_to_put_it(
    server: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how != "--offline":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = refusal(capsys, tmp_path / "new", *(["--offline"] if how == "--offline" else []))
    assert message == (
        f"error: offline ({how}): on a machine with a network download "
        f"{server.endpoint}{PATH} ({len(CONTENT):,} bytes, SHA-256 {digest(CONTENT)}), "
        f"and put the file at {tmp_path / 'new' / FILE}"
    )
    assert server.requests == []
    assert not (tmp_path / "new").exists()


def test_offline_modelscope_has_its_own_address(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        "https://www.modelscope.cn/api/v1/models/AI-ModelScope/chinese-clip-rn50/repo"
        "?Revision=master&FilePath=clip_cn_rn50.pt (308,316,425 "
    ) in refusal(capsys, tmp_path, "--offline", "--hub", "modelscope")


def test_a_disk_without_room_is_told_before_the_file_comes(
    server: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    message = refusal(capsys, tmp_path)
    assert message.endswith(
        f"{tmp_path}: {FILE} takes {len(CONTENT):,} more bytes and the disk has 1,000 left; free space, or choose "
        "another download_root"
    )
    assert server.gets() == []


def test_a_disk_that_fills_meanwhile_is_told_in_one_sentence(server: FakeHub, tmp_path: Path) -> None:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    code = (
        "from dataclasses import replace\nfrom cn_clip import cli, zoo\n"
        "zoo.PUBLISHED['RN50'] = replace(zoo.PUBLISHED['RN50'], sha256=None)\n"
        f"cli.main(['download', 'RN50', '--download-root', {str(tmp_path)!r}])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, preexec_fn=limit, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"error: {tmp_path}: {FILE} cannot be written there (File too large); free space, or choose another "
        "download_root"
    )
    assert not (tmp_path / FILE).exists()


def test_a_folder_that_may_not_be_written_is_told_in_one_sentence(
    server: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Lock, "acquire", refuse)
    assert f"{tmp_path}: {FILE} cannot be written there (Permission denied)" in refusal(capsys, tmp_path)


def test_modelscope_may_have_another_file_which_is_said(
    server: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(model_id: str, file_path: str, local_dir: str) -> str:
        path = Path(local_dir) / file_path
        path.write_bytes(b"another")
        return str(path)

    modules = {name: ModuleType(name) for name in ("modelscope", "modelscope.hub", "modelscope.hub.file_download")}
    modules["modelscope.hub.file_download"].model_file_download = fetch  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    download(tmp_path, "--hub", "modelscope")
    assert "SHA-256 differs from that on Hugging Face" in capsys.readouterr().out
    assert server.requests == []


def test_what_modelscope_is_not_known_to_have_is_not_asked_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["download", "QA-CLIP-RN50", "--hub", "modelscope", "--download-root", str(tmp_path)])
    assert "QA-CLIP-RN50.pt is not known to be on ModelScope" in capsys.readouterr().err


def test_qa_clip_comes_from_its_own_repository(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["download", "QA-CLIP-ViT-B-16", "--offline", "--download-root", str(tmp_path)])
    assert "/TencentARC/QA-CLIP/resolve/main/QA-CLIP-base.pt (1,569,891,012 " in capsys.readouterr().err


def test_the_bundled_model_needs_no_download(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["download", "Emoji-Tiny", "--offline"])
    path = zoo.BUNDLED["Emoji-Tiny"].path
    assert capsys.readouterr().out == f"comes with this package, nothing to download: {path}\n"


def test_an_unknown_name_is_refused_with_those_known(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["download", "ViT-B-17"])
    assert stopped.value.code == 2
    assert "ViT-B-17: no such model; expected one of ViT-B-16" in " ".join(capsys.readouterr().err.split())
