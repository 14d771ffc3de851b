"""The command `cn-clip serve` as a process: it starts, drains at SIGTERM, and says in one line what it cannot open."""

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import httpx
import numpy as np
import picture_bombs as bombs
import pytest
import torch
import warm_python
from serving import data_url, queue_depth, wait_until
from tiny_families import write_family

from cn_clip.clip.choice import Choice
from cn_clip.clip.encoder import Encoder
from cn_clip.clip.loading import create_model
from cn_clip.emoji_pack import load
from cn_clip.errors import ConfigError, DataError
from cn_clip.serve import main, opening, server

COMMAND = ["-m", "cn_clip", "serve", "--port", "0"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@contextmanager
def started(
    *args: str, key: str = "", stderr: IO[str] | int = subprocess.DEVNULL, python: str = ""
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, and its address once it is ready; of a `python` other than the warm one it is the server itself."""
    environment = {**ENVIRONMENT, **({main.API_KEY_VARIABLE: key} if key else {})}
    with subprocess.Popen(
        [python or warm_python.program(), *COMMAND, *args],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env=environment,
    ) as process:
        try:
            assert process.stdout is not None
            lines = iter(process.stdout)
            address = next(lines).split("; ")[-1].strip()
            assert any("ready: " in line for line in lines)
            yield process, address
        finally:
            process.kill()


def refusal(*args: str) -> str:
    """What a command that cannot start says, in one line."""
    done = subprocess.run(
        [warm_python.program(), *COMMAND, "--no-page", *args],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if " INFO:" not in line]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_sigterm_lets_what_is_queued_finish_and_takes_no_more() -> None:
    with (
        started("--no-page", "--model", "Emoji-Tiny", "--max-wait-ms", "5000") as (process, address),
        ThreadPoolExecutor() as pool,
    ):
        request = {"model": "Emoji-Tiny", "input": ["一只猫", "一只狗"]}
        # The two texts wait five seconds for others to come.
        waiting = pool.submit(httpx.post, f"{address}/v1/embeddings", json=request, timeout=120)
        wait_until(lambda: queue_depth(address) == 2)
        process.send_signal(signal.SIGTERM)

        def refuses() -> bool:
            try:
                return httpx.get(f"{address}/healthz").status_code != 200
            except httpx.ConnectError:
                return True

        wait_until(refuses)
        assert len(waiting.result().json()["data"]) == 2
        assert process.wait(60) == 0


def test_what_takes_longer_than_the_drain_is_told_that_the_server_stops() -> None:
    flags = ("--max-wait-ms", "3600000", "--timeout", "3600", "--drain-timeout", "1")
    with started("--no-page", "--model", "Emoji-Tiny", *flags) as (process, address), ThreadPoolExecutor() as pool:
        request = {"model": "Emoji-Tiny", "input": "一只猫"}
        waiting = pool.submit(httpx.post, f"{address}/v1/embeddings", json=request, timeout=120)
        wait_until(lambda: queue_depth(address) == 1)
        process.send_signal(signal.SIGTERM)
        assert (waiting.result().status_code, waiting.result().json()["error"]["code"]) == (503, "stopping")
        assert process.wait(60) == 0


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_sigterm_ends_a_server_whose_decoders_stand_still_and_them() -> None:
    flags = ("--timeout", "3600", "--drain-timeout", "1")
    with (
        started("--no-page", "--model", "Emoji-Tiny", *flags, python=sys.executable) as (process, address),
        ThreadPoolExecutor() as pool,
    ):
        decoders = children(process.pid)
        assert decoders
        for pid in decoders:
            os.kill(pid, signal.SIGSTOP)
        request = {"model": "Emoji-Tiny", "input": [{"image": data_url(load()[0].picture, "webp")}] * 8}
        waiting = pool.submit(httpx.post, f"{address}/v1/embeddings", json=request, timeout=120)
        wait_until(lambda: queue_depth(address, "pictures") == 8)
        # No text waits for them.
        text = httpx.post(f"{address}/v1/embeddings", json={"model": "Emoji-Tiny", "input": "一只猫"}, timeout=120)
        assert text.status_code == 200
        process.send_signal(signal.SIGTERM)
        assert (waiting.result().status_code, waiting.result().json()["error"]["code"]) == (503, "stopping")
        assert process.wait(60) == 0
        assert not any(Path(f"/proc/{pid}").exists() for pid in decoders)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_the_decoders_of_a_server_that_is_killed_end_too() -> None:
    with started("--no-page", "--model", "Emoji-Tiny", python=sys.executable) as (process, _):
        decoders = children(process.pid)
        assert decoders
        process.kill()
        process.wait(60)
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in decoders))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_sigterm_ends_a_server_that_is_sent_bombs_and_decodes_what_takes_long() -> None:
    flags = ("--drain-timeout", "1")
    # The first two are refused; the last takes a process all the time that it has.
    pictures = [bombs.gif_comment(7_400_000), bombs.jpeg_scans(3000), bombs.bmp_run_length(3900)]
    with (
        started("--no-page", "--model", "Emoji-Tiny", *flags, python=sys.executable) as (process, address),
        ThreadPoolExecutor() as pool,
    ):
        decoders = children(process.pid)

        def ask(picture: bytes) -> int:
            request = {"model": "Emoji-Tiny", "input": {"image": data_url(picture)}}
            try:
                return httpx.post(f"{address}/v1/embeddings", json=request, timeout=120).status_code
            except (httpx.ConnectError, httpx.RemoteProtocolError):  # it came after the signal
                return 503

        waiting = [pool.submit(ask, picture) for picture in [*pictures, *pictures[2:] * 7]]
        wait_until(lambda: queue_depth(address, "pictures") >= 5)
        assert httpx.get(f"{address}/readyz").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert {one.result() for one in waiting} <= {200, 400, 503}
        assert not any(Path(f"/proc/{pid}").exists() for pid in decoders)


_STUCK = """
import sys, threading
from cn_clip.serve import main, opening
opening.open_model = lambda *_: threading.Event().wait()
main.main(sys.argv[1:])
"""


def test_sigterm_ends_a_server_one_of_whose_threads_never_returns() -> None:
    command = [warm_python.program(), "-c", _STUCK, "--no-page", "--port", "0", "--drain-timeout", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().split("; ")[-1].strip()
            wait_until(lambda: httpx.get(f"{address}/readyz").status_code == 503)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
            assert "stopped, with threads that did not end" in process.stdout.read()
        finally:
            process.kill()


def test_a_key_that_can_be_guessed_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    for key in ("secret", "a" * 40, "password1234567"):
        server._warn("localhost", key)
        assert "the API key can be guessed" in capsys.readouterr().err
    for key in (None, secrets.token_urlsafe(), secrets.token_hex(16)):
        server._warn("localhost", key)
        assert capsys.readouterr().err == ""


def test_a_body_that_is_still_on_its_way_when_the_server_ends_is_refused_without_a_trace_in_the_log(
    tmp_path: Path,
) -> None:
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with (
        (tmp_path / "log").open("w", encoding="utf-8") as log,
        started("--no-page", "--model", "Emoji-Tiny", "--drain-timeout", "1", stderr=log) as (process, address),
        socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1])), timeout=60) as sender,
    ):
        sender.sendall(head + b'Content-Length: 1000\r\n\r\n{"input": ')
        wait_until(lambda: httpx.get(f"{address}/readyz").status_code == 200)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        answer = sender.recv(65536)
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"the server is stopping" in answer
    assert "Traceback" not in (tmp_path / "log").read_text(encoding="utf-8")


def test_lines_tell_when_it_started_was_ready_and_stopped_and_with_a_flag_who_asked() -> None:
    with started("--no-page", "--model", "Emoji-Tiny", "--access-log") as (process, address):
        httpx.get(f"{address}/v1/models?a=1")
        process.terminate()
        assert process.stdout is not None
        lines = process.stdout.read().splitlines()
        assert process.wait(60) == 0
    times = [line[:20] for line in lines]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", time) for time in times), lines
    assert '"GET /v1/models?a=1 HTTP/1.1" 200' in lines[0]
    assert [line[20:] for line in lines[1:]] == ["stopped: Emoji-Tiny"]


def test_fast_decoding_reaches_the_model() -> None:
    encoder = opening.open_model(Choice("Emoji-Tiny", device="cpu", decode="fast"), [])
    assert encoder.transform.draft_size == encoder.backend.resolution


def test_the_key_of_the_environment_is_asked_for() -> None:
    with started("--no-page", "--model", "Emoji-Tiny", "--name", "emoji", key="k") as (_, address):
        assert httpx.get(f"{address}/v1/models").status_code == 401
        answer = httpx.get(f"{address}/v1/models", headers={"Authorization": "Bearer k"})
        assert [one["id"] for one in answer.json()["data"]] == ["emoji"]


def test_what_cannot_be_opened_is_said_in_one_line(tmp_path: Path) -> None:
    assert "Model missing.pt not found" in refusal("--model", "missing.pt")
    assert "is no index; build one with" in refusal(str(tmp_path), "--model", "Emoji-Tiny")


@pytest.mark.long
def test_a_model_of_another_family_answers_in_torch_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    family = f"hf:{write_family(tmp_path / 'family', 'siglip')}"
    (tmp_path / "animals.txt").write_text("Cat\nDog\n", encoding="utf-8")
    with started("--no-page", "--model", family, "--label-sets", str(tmp_path / "animals.txt")) as (_, address):
        request = {"model": "family", "input": ["a red HEART", {"image": data_url(load()[0].picture, "webp")}]}
        answer = httpx.post(f"{address}/v1/embeddings", json=request).json()
        found = np.array([one["embedding"] for one in answer["data"]], dtype=np.float32)
        labels = {"image": data_url(load()[0].picture, "webp"), "label_set": "animals"}
        assert len(httpx.post(f"{address}/v1/classify", json=labels).json()["data"]) == 2
    encoder = Encoder(family, device="cpu")
    expected = [encoder.encode_texts(["a red HEART"])[0], encoder.encode_images([load()[0].picture])[0]]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
    with pytest.raises(SystemExit) as refused:  # by the options alone, before anything is opened
        main.main(["--model", family, "--backend", "onnx"])
    assert refused.value.code == 2
    assert "backend: onnx runs Chinese-CLIP alone" in capsys.readouterr().err


def test_an_index_that_records_no_model_is_refused_before_any_is_opened(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"image_id": 1, "feature": [1.0, 0.0]}\n', encoding="utf-8")
    command = [warm_python.program(), "-m", "cn_clip", "index", "build", str(rows), "--output", str(tmp_path / "i")]
    subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT)
    assert "i: the index does not record its model" in refusal(str(tmp_path / "i"))


def test_an_index_is_searched_with_its_own_model_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for one in load()[:5]:
        (tmp_path / "pictures" / f"{one.number}.webp").write_bytes(one.picture)
    folder = tmp_path / "five.index"
    command = [
        warm_python.program(),
        "-m",
        "cn_clip",
        "index",
        "build",
        str(tmp_path / "pictures"),
        "--output",
        str(folder),
    ]
    subprocess.run([*command, "--model", "Emoji-Tiny"], check=True, capture_output=True, env=ENVIRONMENT)
    with started("--no-page", str(folder)) as (_, address):
        picture = data_url(load()[2].picture, "webp")
        answer = httpx.post(f"{address}/v1/search", json={"query": {"image": picture}, "k": 1}).json()
        assert answer["model"] == "Emoji-Tiny"
        (hit,) = answer["data"]
        assert (hit["id"], round(hit["score"], 4)) == (f"{load()[2].number}.webp", 1)
        assert httpx.get(f"{address}{hit['thumbnail']}").content.startswith(b"\xff\xd8")
    path = tmp_path / "other.pt"
    torch.save({"state_dict": create_model("ViT-Tiny-64@BERT-Tiny-chinese").state_dict()}, path)
    assert "its vectors are of the model Emoji-Tiny" in refusal(str(folder), "--model", str(path))


def test_a_port_in_use_is_refused() -> None:
    with server.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--host 127.0.0.1 --port {port}: cannot be listened at"):
            server.listen("127.0.0.1", port)


def test_answers_do_not_wait_for_acknowledgements() -> None:
    with server.listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


def test_label_sets_are_called_by_their_files_names(tmp_path: Path) -> None:
    (tmp_path / "animals.txt").write_text("猫\n狗\n", encoding="utf-8")
    assert opening.read_label_sets([tmp_path / "animals.txt"]) == {"animals": ["猫", "狗"]}
    with pytest.raises(DataError, match=r"other\.txt: cannot be opened"):
        opening.read_label_sets([tmp_path / "other.txt"])
    with pytest.raises(ConfigError, match="files of different names"):
        opening.read_label_sets([tmp_path / "animals.txt"] * 2)


def test_the_key_comes_from_the_flag_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(main.API_KEY_VARIABLE, " a ")
    assert main.key_of(main.Options()) == "a"
    assert main.key_of(main.Options(api_key="b")) == "b"
    with pytest.raises(ConfigError, match="got an empty one"):
        main.key_of(main.Options(api_key=" "))


def test_the_model_is_called_by_its_name_or_that_of_its_file() -> None:
    assert opening.served_name("Emoji-Tiny") == "Emoji-Tiny"
    assert opening.served_name("/somewhere/epoch3.pt") == "epoch3"
    assert opening.served_name("hf:siglip") == opening.served_name("hf:models/siglip") == "siglip"
