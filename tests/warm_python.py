"""A stand-in for `python` whose processes start with PyTorch imported: for tests that run many commands.

Each command is a process of its own, forked from one that has imported what takes seconds, with the arguments, folder,
environment and standard streams of the caller; started in a new session, it has a group of its own, which gets the
signals. `program()` is the path of an executable that is used like python:
`python FILE`, `python -m MODULE` or `python -c CODE`, with or without `-u`; any other use starts a real one. A test of
start-up itself, of encodings or of what a command imports needs a real one, which is `sys.executable`.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import shortcuts

# What many commands import and none must avoid; nothing of this project.
IMPORTED = (
    "numpy",
    "torch",
    "torch.distributed.run",
    "torch.onnx",
    "torch._dynamo",
    "PIL.Image",
    "lmdb",
    "onnx",
    "onnxscript",
    "fastapi",
    "prometheus_client",
    "tyro",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "uvicorn",
    "starlette.applications",
)
# Runs without site-packages, which would cost more than all it does. Its death ends the process that it stands for,
# signals that ask for an end are handed on, and it ends as that process did.
CLIENT = """
import array, json, os, signal, socket, struct, sys
if sys.argv[1:2] == ["-u"]:
    del sys.argv[1]
if len(sys.argv) < 2 or sys.argv[1].startswith("-") and sys.argv[1] not in ("-m", "-c"):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
leads = os.getsid(0) == os.getpid()
request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ), leads]).encode("utf-8", "surrogateescape")
line = socket.socket(socket.AF_UNIX)
line.connect({address!r})
line.sendmsg([struct.pack("!I", len(request))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
line.sendall(request)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: line.send(bytes([number])))
status = int(line.recv(16) or b"70")
if status < 0:
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


@functools.cache
def program() -> str:
    """The path of the executable; its processes end with the one that calls this."""
    if not hasattr(os, "pidfd_open"):  # Linux has it
        return sys.executable
    folder = Path(tempfile.mkdtemp(prefix="warm-python-"))
    address = str(folder / "socket")
    server = subprocess.Popen([sys.executable, __file__, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    atexit.register(stop, server, folder)
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"
    client, path = folder / "client.py", folder / "python"
    client.write_text(CLIENT.format(python=sys.executable, address=address), encoding="utf-8")
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{client}" "$@"\n', encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def stop(server: "subprocess.Popen[bytes]", folder: Path) -> None:
    server.communicate()
    shutil.rmtree(folder)


def receive(line: socket.socket) -> "tuple[list[str], str, dict[str, str], bool]":
    """What the client asks for, and whether it leads a session; its standard streams become those of this process."""
    head, descriptors, _, _ = socket.recv_fds(line, 4, 3)
    size, request = int.from_bytes(head, "big"), b""
    while len(request) < size:
        request += line.recv(size - len(request))
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    arguments, folder, environment, leads = json.loads(request.decode("utf-8", "surrogateescape"))
    return arguments, folder, environment, leads


def start(arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    """Does what python does with these arguments, in this process."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if environment.get("PYTHONUNBUFFERED"):
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.path[1:1] = [os.path.abspath(one) for one in environment.get("PYTHONPATH", "").split(os.pathsep) if one]
    shortcuts.install()
    if arguments[0] == "-m":
        sys.argv, sys.path[0] = arguments[1:], folder
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *arguments[2:]], ""
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(arguments[1], "<string>", "exec"), vars(sys.modules["__main__"]))
    else:
        sys.argv, sys.path[0] = arguments, os.path.dirname(os.path.realpath(arguments[0]))
        runpy.run_path(arguments[0], run_name="__main__")


def ending(run: Callable[[], None]) -> NoReturn:
    """Runs, and ends the process as Python does, but that nothing imported is taken apart: that takes half a second."""
    status = 0
    try:
        run()
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            status = 120
    os._exit(status & 0xFF)


def watch(line: socket.socket, child: int, leads: bool) -> None:
    """Hands signals on to the child and says to the client how it ended; kills it if the client is gone before that."""
    send = os.killpg if leads else os.kill
    descriptor = os.pidfd_open(child)
    while descriptor not in select.select([line, descriptor], [], [])[0]:
        numbers = line.recv(1)
        send(child, numbers[0] if numbers else signal.SIGKILL)
        if not numbers:
            break
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(OSError):
        line.sendall(str(status).encode())


def serve(address: str) -> "tuple[list[str], str, dict[str, str]]":
    """Returns what a client asks for, in a new process for each; the first process ends with its owner."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    os.write(1, b"ready\n")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.freeze()  # a collection in a child would otherwise touch, and so copy, all that was imported
    while 0 not in select.select([0, listener], [], [])[0]:
        line, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            *asked, leads = receive(line)
            child = os.fork()
            if leads:
                os.setpgid(child, child)  # both do, so that it has one before either goes on
            if child == 0:
                line.close()
                return asked
            watch(line, child, leads)
            os._exit(0)
        line.close()
    os._exit(0)


if __name__ == "__main__":
    for name in IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    ending(functools.partial(start, *serve(sys.argv[1])))
