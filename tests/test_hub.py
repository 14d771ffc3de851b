"""Downloads by name, against a local server that answers as the Hugging Face hub does."""

import hashlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fake_hub import CONTENT, PATH, STORAGE_PATH, FakeHub, leftovers, serving

from cn_clip import zoo
from cn_clip.clip.weights import hub
from cn_clip.errors import DownloadError, MissingExtraError

# The server's file is not the published one.
PUBLISHED = replace(zoo.PUBLISHED["RN50"], sha256=None)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serving(monkeypatch) as fake:
        yield fake


def test_a_fresh_download_makes_the_folder_and_leaves_the_file_alone(server: FakeHub, tmp_path: Path) -> None:
    root = tmp_path / "new" / "folder"
    path = hub.download(PUBLISHED, root)
    assert path == root / "clip_cn_rn50.pt"
    assert path.read_bytes() == CONTENT
    assert leftovers(root) == ["clip_cn_rn50.pt"]
    assert server.gets() == [None]


def test_a_second_call_asks_the_server_nothing(server: FakeHub, tmp_path: Path) -> None:
    hub.download(PUBLISHED, tmp_path)
    asked = len(server.requests)
    assert hub.download(PUBLISHED, str(tmp_path)).read_bytes() == CONTENT
    assert len(server.requests) == asked


def test_a_file_put_there_by_hand_is_used_as_is(server: FakeHub, tmp_path: Path) -> None:
    (tmp_path / PUBLISHED.filename).write_bytes(b"my own")
    assert hub.download(PUBLISHED, tmp_path).read_bytes() == b"my own"
    assert server.requests == []


def test_a_cut_connection_is_resumed_where_it_broke(server: FakeHub, tmp_path: Path) -> None:
    server.cuts = 1
    for _ in range(2):  # versions of huggingface_hub before 2 leave it to the next call
        try:
            path = hub.download(PUBLISHED, tmp_path)
        except DownloadError:
            continue
        break
    assert path.read_bytes() == CONTENT
    _assert_went_on(server.gets())


def test_a_later_run_goes_on_where_an_interrupted_one_stopped(server: FakeHub, tmp_path: Path) -> None:
    server.cuts, server.refusals = 1, 10
    with pytest.raises(DownloadError, match="try again to go on from there"):
        hub.download(PUBLISHED, tmp_path)
    assert not (tmp_path / PUBLISHED.filename).exists()
    server.refusals = 0
    assert hub.download(PUBLISHED, tmp_path).read_bytes() == CONTENT
    _assert_went_on(server.gets())
    assert leftovers(tmp_path) == ["clip_cn_rn50.pt"]


def _assert_went_on(ranges: list[str | None]) -> None:
    assert ranges[0] is None
    assert ranges[-1] is not None
    assert 0 < int(ranges[-1].removeprefix("bytes=").rstrip("-")) <= len(CONTENT) // 2


def test_a_server_without_ranges_costs_time_and_no_bytes(server: FakeHub, tmp_path: Path) -> None:
    server.cuts, server.ranges_work = 1, False
    for _ in range(3):  # versions of huggingface_hub before 1 append, see the wrong size, and begin again when called
        try:
            path = hub.download(PUBLISHED, tmp_path)
        except DownloadError:
            continue
        break
    assert path.read_bytes() == CONTENT


def test_a_redirect_to_the_storage_is_followed_without_the_token(
    server: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.redirects = True
    assert hub.download(PUBLISHED, tmp_path).read_bytes() == CONTENT
    assert (PATH, "Bearer hf_secret") in server.tokens
    assert (STORAGE_PATH, None) in server.tokens
    assert (STORAGE_PATH, "Bearer hf_secret") not in server.tokens


def test_bytes_of_another_version_of_the_file_are_not_mixed_in(server: FakeHub, tmp_path: Path) -> None:
    server.cuts, server.refusals = 1, 10
    with pytest.raises(DownloadError):
        hub.download(PUBLISHED, tmp_path)
    server.refusals, server.content = 0, CONTENT[::-1]
    server.etag = hashlib.sha256(server.content).hexdigest()
    assert hub.download(PUBLISHED, tmp_path).read_bytes() == CONTENT[::-1]
    assert server.gets()[-1] is None


def test_a_part_longer_than_the_file_is_thrown_away(server: FakeHub, tmp_path: Path) -> None:
    part = hashlib.sha256(server.etag.encode()).hexdigest()[:16]
    folder = tmp_path / f".{PUBLISHED.filename}.download"
    folder.mkdir()
    (folder / f"{part}.part").write_bytes(CONTENT + b"more")
    assert hub.download(PUBLISHED, tmp_path).read_bytes() == CONTENT


def test_a_corrupt_file_is_refused_and_removed(server: FakeHub, tmp_path: Path) -> None:
    server.content = b"\1" + CONTENT[1:]
    with pytest.raises(DownloadError, match=r"expected the SHA-256 [0-9a-f]{64}, got [0-9a-f]{64}; the file was"):
        hub.download(PUBLISHED, tmp_path)
    assert leftovers(tmp_path) == []
    server.content = CONTENT
    assert hub.download(PUBLISHED, tmp_path).read_bytes() == CONTENT


def test_an_etag_that_is_no_sha256_is_not_compared(server: FakeHub, tmp_path: Path) -> None:
    server.etag = "a" * 40
    assert hub.download(PUBLISHED, tmp_path).read_bytes() == CONTENT


def test_a_missing_file_names_the_repository_the_server_and_the_next_step(server: FakeHub, tmp_path: Path) -> None:
    absent = zoo.Published("chinese-clip-none", "none.pt", "RN50", "RBT3-chinese", 224)
    with pytest.raises(DownloadError) as caught:
        hub.download(absent, tmp_path)
    message = str(caught.value)
    assert message.startswith(f"could not download none.pt from OFA-Sys/chinese-clip-none at {server.endpoint}: ")
    assert "404" in message
    assert "set HF_ENDPOINT to a mirror, run `cn-clip download MODEL --hub modelscope`, or download the file" in message
    assert "\n" not in message
    assert leftovers(tmp_path) == []


def test_a_server_that_does_not_answer_is_a_download_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match=r"at http://127\.0\.0\.1:9: "):
        hub.download(PUBLISHED, tmp_path)


def test_offline_mode_asks_the_server_nothing(server: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set"):
        hub.download(PUBLISHED, tmp_path)
    assert server.requests == []


def test_concurrent_downloads_fetch_once_and_agree(server: FakeHub, tmp_path: Path) -> None:
    answers: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: answers.append(hub.download(PUBLISHED, tmp_path).read_bytes()))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [CONTENT] * 6
    assert len(server.gets()) == 1


def test_a_file_that_another_process_puts_there_meanwhile_is_taken(
    server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, exists, looked = tmp_path / PUBLISHED.filename, os.path.exists, os.path.isfile

    def meanwhile(look: Callable[[object], bool]) -> Callable[[object], bool]:
        def answer(path: object) -> bool:
            found = look(path)
            if path == target and not exists(target):
                target.write_bytes(CONTENT)
            return found

        return answer

    monkeypatch.setattr(os.path, "isfile", meanwhile(looked))
    monkeypatch.setattr(os.path, "exists", meanwhile(exists))
    assert hub.download(PUBLISHED, tmp_path).read_bytes() == CONTENT


def test_a_root_that_is_a_file_is_refused(server: FakeHub, tmp_path: Path) -> None:
    root = tmp_path / "file"
    root.write_text("not a folder")
    with pytest.raises(DownloadError, match=r"cannot be made a folder .*choose another download_root"):
        hub.download(PUBLISHED, root)
    assert server.requests == []


def test_a_folder_in_the_place_of_the_file_is_refused(server: FakeHub, tmp_path: Path) -> None:
    (tmp_path / PUBLISHED.filename).mkdir()
    with pytest.raises(DownloadError, match=r"clip_cn_rn50\.pt exists and is not a regular file"):
        hub.download(PUBLISHED, tmp_path)


def _install_modelscope(monkeypatch: pytest.MonkeyPatch, fetch: Any) -> None:
    modules = {name: ModuleType(name) for name in ("modelscope", "modelscope.hub", "modelscope.hub.file_download")}
    modules["modelscope.hub.file_download"].model_file_download = fetch  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def test_modelscope_is_asked_for_its_own_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def fetch(model_id: str, file_path: str, local_dir: str) -> str:
        asked.append((model_id, file_path))
        path = Path(local_dir) / file_path
        (Path(local_dir) / "._____temp").mkdir()
        path.write_bytes(CONTENT)
        return str(path)

    _install_modelscope(monkeypatch, fetch)
    for _ in range(2):
        path = hub.download(PUBLISHED, tmp_path, use_modelscope=True)
        assert path == tmp_path / PUBLISHED.filename
        assert path.read_bytes() == CONTENT
    assert asked == [("AI-ModelScope/chinese-clip-rn50", "clip_cn_rn50.pt")]
    assert leftovers(tmp_path) == ["clip_cn_rn50.pt"]


def test_a_failure_of_modelscope_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fetch(**_: str) -> str:
        raise ValueError("no such\nmodel")

    _install_modelscope(monkeypatch, fetch)
    with pytest.raises(DownloadError, match="AI-ModelScope/chinese-clip-rn50 on ModelScope: no such model; try again"):
        hub.download(PUBLISHED, tmp_path, use_modelscope=True)
    assert leftovers(tmp_path) == []


def test_modelscope_absent_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'cn-clip-next\[modelscope\]'"):
        hub.download(PUBLISHED, tmp_path, use_modelscope=True)
