"""A running service under attack, and under mixed load for minutes: what is right for anything a client may send."""

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import serve_soak
from faults.counts import Counts
from faults.mutations import either, odd_bytes, odd_json
from picture_bombs import (
    bmp_run_length,
    gif_comment,
    jpeg_exif_directory,
    jpeg_scans,
    png_chunks,
    png_exif_directory,
)
from serve_load import ROOT, data_url

from cn_clip import emoji_pack

_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
# What may be answered; 500 would be a fault of the service.
_ANSWERS = {200, 204, 303, 307, 400, 401, 403, 404, 405, 408, 411, 413, 415, 421, 422, 429, 431, 501, 503, 504, 505}
# Seconds after which the service gives up a request, and those that a client waits.
_TIMEOUT, _PATIENCE = 5, 90.0
_CLIENTS = 6
NAME = "served"


@dataclass(frozen=True)
class Service:
    """A service that is ready. log: where its standard error goes."""

    process: "subprocess.Popen[str]"
    port: int
    log: Path

    def tracebacks(self) -> int:
        """Tracebacks in its log."""
        return self.log.read_text(encoding="utf-8", errors="replace").count("Traceback (most recent call last)")


@contextlib.contextmanager
def serving(folder: Path, *, timeout: int = _TIMEOUT) -> Iterator[Service]:
    """`cn-clip serve` of an index of emoji, with its page. timeout: seconds, as its flag."""
    pictures = folder / "pictures"
    pictures.mkdir()
    for one in emoji_pack.load()[:30]:
        (pictures / f"{one.number}.webp").write_bytes(one.picture)
    start = [sys.executable, "-m", "cn_clip"]
    index, environment = str(folder / "index"), dict(os.environ)
    environment.pop("LD_PRELOAD", None)
    build = [*start, "index", "build", str(pictures), "--output", index, "--model", "Emoji-Tiny", "--device", "cpu"]
    subprocess.run(build, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    flags = ["--port", "0", "--name", NAME, "--timeout", str(timeout), "--drain-timeout", "5", "--device", "cpu"]
    with (
        open(folder / "log", "w", encoding="utf-8") as log,
        subprocess.Popen(
            [*start, "serve", index, *flags],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            encoding="utf-8",
            cwd=ROOT,
            env=environment,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            lines = iter(process.stdout)
            address = next(found[0] for line in lines if (found := re.search(r"http://[\w.]+:(\d+)", line)))
            if not any("ready" in line for line in lines):
                raise RuntimeError(f"the service did not start: {(folder / 'log').read_text(encoding='utf-8')[-500:]}")
            threading.Thread(target=lambda: [None for _ in lines], daemon=True).start()
            yield Service(process, int(address.rsplit(":", 1)[1]), folder / "log")
        finally:
            if process.poll() is None:
                process.kill()


def attack(seconds: float, *, seed: int) -> Counts:
    """Sends hostile requests for `seconds`; in between, and in the end, honest ones must be answered as before."""
    counts, begin = Counts("http"), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as root, serving(Path(root)) as service:
        honest = _honest(service.port)
        until, adding = begin + seconds, threading.Lock()

        def client(number: int) -> None:
            rng, kinds = random.Random(f"{seed}/{number}"), list(_KINDS[number::_CLIENTS])
            while kinds or time.monotonic() < until:
                name, make = kinds.pop(0) if kinds else rng.choice(_KINDS)
                pieces = make(rng)
                outcome, what = _sent(service.port, pieces)
                with adding:
                    counts.add(outcome, f"{name}: {what}; sent {b''.join(pieces)[:200]!r}")  # type: ignore[arg-type]

        clients = [threading.Thread(target=client, args=(number,)) for number in range(_CLIENTS)]
        for one in clients:
            one.start()
        for one in clients:
            one.join()
        _settle(service, honest, counts)
    counts.seconds = time.monotonic() - begin
    return counts


def _settle(service: Service, honest: bytes, counts: Counts) -> None:
    """After the attack: the same answer, no traceback in the log, and an end in the time that was promised."""
    if service.process.poll() is not None:
        counts.add("signal", f"the service ended with {service.process.returncode}")
        return
    if _honest(service.port) != honest:
        counts.add("difference", "an honest request is answered otherwise than before")
    for _ in range(service.tracebacks()):
        counts.add("traceback", f"in the log: {service.log.read_text(encoding='utf-8', errors='replace')[-800:]}")
    service.process.send_signal(signal.SIGTERM)
    try:
        service.process.wait(timeout=5 + 2 + 10)  # a busy machine has ten seconds more
    except subprocess.TimeoutExpired:
        counts.add("signal", "SIGTERM did not end the service in time")


def _honest(port: int) -> bytes:
    """The answer to a search, without what changes from one to the next."""
    request = _post("/v1/search", json.dumps({"query": "红色的心", "k": 5}).encode())
    for _ in range(60):
        answer = _exchange(port, [request])
        if answer.startswith(b"HTTP/1.1 200"):
            return answer.partition(b"\r\n\r\n")[2]
        time.sleep(1)
    raise RuntimeError(f"an honest request is not answered: {answer[:300]!r}")


def _sent(port: int, pieces: Sequence[bytes]) -> tuple[str, str]:
    try:
        answer = _exchange(port, pieces)
    except TimeoutError:
        return "signal", f"no answer and no end within {_PATIENCE:.0f} s"
    if not answer:
        return "sentence", "closed"
    found = _STATUS.match(answer)
    if found is None:
        return "difference", f"no HTTP: {answer[:200]!r}"
    statuses = {int(one) for one in re.findall(rb"^HTTP/1\.1 (\d{3}) ", answer, re.MULTILINE)} - {100}
    if statuses - _ANSWERS:
        return "traceback", f"answered {sorted(statuses)}: {answer[:300]!r}"
    return ("fine" if int(found[1]) == 200 else "sentence"), found[1].decode()


def _exchange(port: int, pieces: Sequence[bytes]) -> bytes:
    """All that comes back until the server closes or is silent for a while after an answer."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE) as connection:
        try:
            for number, piece in enumerate(pieces):
                if number:
                    time.sleep(0.05)
                connection.sendall(piece)
            while piece := connection.recv(1 << 16):
                answer += piece
                connection.settimeout(1.0 if answer else _PATIENCE)
        except ConnectionError:
            pass
        except TimeoutError:
            if not answer:
                raise
    return answer


# --- what is sent -----------------------------------------------------------------------------------------------------


def _post(path: str, body: bytes, *more: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", "Connection: close", *more]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def _bodies() -> list[tuple[str, bytes]]:
    pictures = [data_url(one.picture) for one in emoji_pack.load()[:3]]
    asked: list[tuple[str, Any]] = [
        ("/v1/embeddings", {"model": NAME, "input": ["一只猫", "红色"]}),
        ("/v1/embeddings", {"model": NAME, "input": [{"image": pictures[0]}], "encoding_format": "base64"}),
        ("/v1/classify", {"image": pictures[1], "labels": ["心", "猫", "车"], "templates": ["一张{}的图片"]}),
        ("/v1/search", {"query": {"image": pictures[2]}, "k": 3, "where": "path~1", "min_score": 0.1}),
        ("/v1/search", {"query": {"id": "1.webp"}, "k": 3}),
        ("/page/app.js", {}),
    ]
    return [(path, json.dumps(body).encode()) for path, body in asked]


BODIES = _bodies()
_BOMBS = (
    gif_comment(500_000),
    jpeg_scans(900),
    png_chunks(100_000),
    jpeg_exif_directory(2000, 1 << 18),
    png_exif_directory(2000, 1 << 18),
    bmp_run_length(5000),
)
_PATHS = (
    "/etc/passwd",
    "/proc/self/environ",
    "/dev/zero",
    "../../../etc/passwd",
    "%2e%2e/%2e%2e/etc/passwd",
    "file:///etc/passwd",
    "\\\\host\\share",
    "http://169.254.169.254/latest",
)


def _odd_body(rng: random.Random) -> list[bytes]:
    path, body = rng.choice(BODIES)
    return [_post(path, either(odd_json, odd_bytes)(rng, body))]


def _odd_request(rng: random.Random) -> list[bytes]:
    return [odd_bytes(rng, _post(*rng.choice(BODIES)))]


def _paths(rng: random.Random) -> list[bytes]:
    place = rng.choice(_PATHS)
    return rng.choice(
        (
            [_post("/v1/embeddings", json.dumps({"model": NAME, "input": [{"image": place}]}).encode())],
            [f"GET /page/{place} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()],
            [f"GET /{place} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()],
        )
    )


def _bomb(rng: random.Random) -> list[bytes]:
    image = data_url(rng.choice(_BOMBS))
    return [_post("/v1/embeddings", json.dumps({"model": NAME, "input": [{"image": image}]}).encode())]


def _heads(rng: random.Random) -> list[bytes]:
    """Framings that proxies and servers understand in different ways, and heads of any size."""
    body = BODIES[0][1]
    length, second = f"Content-Length: {len(body)}", "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    head = "POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    chunked = f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
    forms: list[tuple[str, bytes]] = [
        (f"{head}{length}\r\nTransfer-Encoding: chunked\r\n\r\n", chunked + second.encode()),
        (f"{head}Transfer-Encoding: chunked\r\n\r\n", chunked),
        (f"{head}Transfer-Encoding: \x0bchunked\r\n\r\n", chunked),
        (f"{head}Transfer-Encoding: chunked, identity\r\n\r\n", chunked),
        (f"{head}Transfer-Encoding: chunked\r\n\r\n", b"fffffffffffffffff\r\n" + body),
        (f"{head}Transfer-Encoding: chunked\r\n\r\n", b"-1\r\n" + body),
        (f"{head}{length}\r\nContent-Length: 0\r\n\r\n", body),
        (f"{head}Content-Length: -1\r\n\r\n", body),
        (f"{head}Content-Length: +{len(body)}\r\n\r\n", body),
        (f"{head}Content-Length: {10**30}\r\n\r\n", body),
        (f"{head}Content-Length: {len(body) + 5}\r\n\r\n", body),
        (f"{head}Content-Length : {len(body)}\r\n\r\n", body),
        (f"{head}X: a\r\n b\r\n{length}\r\n\r\n", body),
        (f"{head}X:{'x' * rng.choice((8000, 20_000, 200_000))}\r\n{length}\r\n\r\n", body),
        (f"{head}" + "".join(f"X{n}: 1\r\n" for n in range(rng.choice((90, 500, 5000)))) + f"{length}\r\n\r\n", body),
        (f"{head}X: \0\r\n{length}\r\n\r\n", body),
        (f"{head}Host: evil.example\r\n{length}\r\n\r\n", body),
        (head.replace("Host: localhost\r\n", "") + f"{length}\r\n\r\n", body),
        (head.replace("localhost", "evil.example") + f"{length}\r\n\r\n", body),
        (f"{head}Expect: 100-continue\r\nContent-Length: 99999999\r\n\r\n", b""),
        (f"{head}Origin: http://evil.example\r\n{length}\r\n\r\n", body),
        (f"{head}Content-Encoding: gzip\r\n{length}\r\n\r\n", body),
        (head.replace("\r\n", "\n") + f"{length}\n\n", body),
        (f"POST {'/' * rng.choice((10, 70_000))} HTTP/1.1\r\nHost: localhost\r\n{length}\r\n\r\n", body),
        (f"POST http://localhost/v1/embeddings HTTP/1.1\r\nHost: localhost\r\n{length}\r\n\r\n", body),
        ("OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n", b""),
        ("CONNECT evil.example:443 HTTP/1.1\r\nHost: localhost\r\n\r\n", b""),
        ("GET /healthz HTTP/3.7\r\nHost: localhost\r\n\r\n", b""),
        ("GET /healthz\r\n\r\n", b""),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b""),
        ("GET /v1/models/%00%ff HTTP/1.1\r\nHost: localhost\r\n\r\n", b""),
        ("GET /healthz HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n", b""),
        (second * rng.choice((2, 50)), b""),
        ("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"\0" * 200),
    ]
    head, data = rng.choice(forms)
    return [head.encode("latin-1") + data]


def _slow(rng: random.Random) -> list[bytes]:
    """Pieces of a request with pauses, perhaps not all of them."""
    data = _post(*rng.choice(BODIES[:5]))
    cuts = sorted(rng.sample(range(1, len(data)), 8))
    pieces = [data[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    return pieces[: rng.choice((1, 3, 9))]


def _strange_values(rng: random.Random) -> list[bytes]:
    """JSON that is valid and takes far more than its bytes, or that the parser before ours would refuse."""
    depth = rng.choice((100, 100_000))
    body = rng.choice(
        (
            b"[" * depth + b"]" * depth,
            b'{"model": "served", "input": ' + b"[" * depth + b"]" * depth + b"}",
            b'{"model": "served", "input": [' + b'"",' * 60_000 + b'""]}',
            b'{"model": "served", "input": "\\ud800"}',
            b'{"model": "served", "input": "x", "input": ["y"]}',
            b'{"model": "served", "dimensions": 1e400, "input": "x"}',
            b'{"model": "served", "input": ' + b"9" * 10_000 + b"}",
            '{"model": "served", "input": "猫"}'.encode("utf-16"),
            b"\xef\xbb\xbf" + BODIES[0][1],
            b"{" + b'"a":1,' * 50_000 + b'"a":1}',
        )
    )
    return [_post(rng.choice(BODIES)[0], body)]


_KINDS: Sequence[tuple[str, Callable[[random.Random], list[bytes]]]] = (
    ("odd body", _odd_body),
    ("odd body", _odd_body),
    ("odd request", _odd_request),
    ("path", _paths),
    ("head", _heads),
    ("head", _heads),
    ("strange values", _strange_values),
    ("slow", _slow),
    ("bomb", _bomb),
)


# --- the soak ---------------------------------------------------------------------------------------------------------


def soak(minutes: float) -> Counts:
    """Mixed honest and refused requests; the memory of the last third must be that of the second, within a share."""
    counts, begin = Counts("soak"), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as root, serving(Path(root), timeout=60) as service:
        options: Any = SimpleNamespace(minutes=minutes, clients=2)
        try:
            seconds, refused, memory_mb = asyncio.run(serve_soak.soak(options, service.process.pid, service.port))
        except Exception as error:
            counts.add("traceback", f"{type(error).__name__}: {error}")
            return counts
        counts.inputs = sum(map(len, seconds.values())) + sum(refused.values())
        counts.found["sentence"] = len(seconds.get("refused", ())) + sum(refused.values())
        parts = [sum(part) / len(part) for part in serve_soak.thirds(memory_mb) if part]
        print(f"[soak] memory, mean of each third: {', '.join(f'{part:.0f}' for part in parts)} MB", flush=True)
        # Shorter runs are still filling their caches.
        if minutes >= 5 and parts[2] > parts[1] * (1 + serve_soak.TOLERANCE):
            counts.add("lost", f"memory grew from {parts[1]:.0f} to {parts[2]:.0f} MB over the last third")
        for _ in range(service.tracebacks()):
            counts.add("traceback", f"in the log: {service.log.read_text(encoding='utf-8')[-800:]}")
    counts.seconds = time.monotonic() - begin
    return counts
