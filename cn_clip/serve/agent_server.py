"""The Model Context Protocol on standard input and output, for the tools of `agent_tools`; `agents` is the command."""

import asyncio
import base64
import contextlib
import functools
import json
import os
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any, cast

import mcp_types as types
from mcp.server.lowlevel.server import Server
from mcp.server.stdio import stdio_server

from cn_clip import __version__, command, progress
from cn_clip.clip.choice import Choice
from cn_clip.clip.opening import precision_of
from cn_clip.serve.agent_tools import AgentTools, Jpeg
from cn_clip.serve.batching import Metrics
from cn_clip.serve.limits import Limits
from cn_clip.serve.opening import open_all
from cn_clip.serve.schemas import RefusalError
from cn_clip.serve.service import Service

INSTRUCTIONS = (
    "A collection of pictures, searched by what they show. Describe the picture to `search` in Chinese or English; "
    "look at results with `thumbnail`; `similar` finds more like one of them; `index_facts` says what there is."
)
# Read at a time, and the name of what is too long to be a request.
_PIECE, _TOO_LONG = 1 << 16, "a line that is too long\n"
_READ_ONLY = types.ToolAnnotations(read_only_hint=True, open_world_hint=False)


def serve(
    chosen: Choice,
    limits: Limits,
    *,
    model: str | None,
    indexes: Sequence[str],
    milvus_config: str | None = None,
    with_paths: bool,
) -> None:
    """Answers one agent until it closes standard input; raises CnClipError for what cannot be opened.

    with_paths: the agent is told where the files of items lie.
    """
    if chosen.backend != "auto":
        chosen = replace(chosen, precision=precision_of(chosen))
    with command.stdout_to_stderr(when=True):
        runners, collections = open_all(
            indexes,
            chosen=chosen,
            limits=limits,
            model=model,
            name=None,
            metrics=Metrics(),
            milvus_config=milvus_config,
        )
    service = Service(runners, limits, collections, with_originals=with_paths)
    with progress.resting():
        asyncio.run(_serve(service))
    for runner in runners:
        if runner.failure is not None:
            raise runner.failure


def server_of(tools: AgentTools) -> Server[Any]:
    """The protocol's side of the tools."""

    async def list_tools(_: Any, __: Any) -> types.ListToolsResult:
        return types.ListToolsResult(
            tools=[
                types.Tool(
                    name=tool.name,
                    description=tool.description,
                    input_schema=tool.request.model_json_schema(),
                    annotations=_READ_ONLY,
                )
                for tool in tools.tools.values()
            ]
        )

    async def call_tool(_: Any, asked: types.CallToolRequestParams) -> types.CallToolResult:
        try:
            answer = await tools.call(asked.name, asked.arguments)
        except RefusalError as error:
            return types.CallToolResult(content=[types.TextContent(text=error.message)], is_error=True)
        if isinstance(answer, Jpeg):
            data = base64.b64encode(answer.data).decode()
            return types.CallToolResult(content=[types.ImageContent(data=data, mime_type="image/jpeg")])
        text = json.dumps(answer, ensure_ascii=False)
        return types.CallToolResult(content=[types.TextContent(text=text)], structured_content=answer)

    return Server(
        "cn-clip", version=__version__, instructions=INSTRUCTIONS, on_list_tools=list_tools, on_call_tool=call_tool
    )


async def _serve(service: Service) -> None:
    server, lines = server_of(AgentTools(service)), Lines(sys.stdin.fileno(), service.limits.max_body_bytes)
    for runner in service.runners:
        runner.start(functools.partial(service.prepare, runner))
    service.collections.watch()
    try:
        async with stdio_server(stdin=cast("Any", lines)) as (requests, answers):
            serving = asyncio.ensure_future(server.run(requests, answers, server.create_initialization_options()))
            failing = [asyncio.ensure_future(runner.failed.wait()) for runner in service.runners]
            await asyncio.wait([serving, *failing], return_when=asyncio.FIRST_COMPLETED)
            for task in failing:
                task.cancel()
            serving.cancel()
            lines.end()
            with contextlib.suppress(asyncio.CancelledError):
                await serving
    finally:
        lines.end()
        service.collections.end()
        for runner in service.runners:
            await runner.stop()


class Lines:
    """The lines of a descriptor; one of more than `most` bytes is passed over, and a short one that is no JSON given.

    They are read by a thread that nothing waits for: a terminal may never close its end. The descriptor is moved, so
    that no library and no child reads it.
    """

    def __init__(self, descriptor: int, most: int) -> None:
        self._loop, self._most = asyncio.get_running_loop(), most
        self._queue: asyncio.Queue[str | None] = asyncio.Queue(1)
        self._ended = asyncio.Event()
        self._descriptor = os.dup(descriptor)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, descriptor)
        os.close(nothing)
        threading.Thread(target=self._read, name="stdin", daemon=True).start()

    def end(self) -> None:
        """No more lines are given."""
        self._ended.set()

    async def __aiter__(self) -> AsyncIterator[str]:
        ended = asyncio.ensure_future(self._ended.wait())
        try:
            while True:
                coming = asyncio.ensure_future(self._queue.get())
                await asyncio.wait([coming, ended], return_when=asyncio.FIRST_COMPLETED)
                line = coming.result() if coming.done() else None
                coming.cancel()
                if line is None:
                    return
                yield line
        finally:
            ended.cancel()

    def _read(self) -> None:
        held, is_too_long = b"", False
        with contextlib.suppress(OSError, RuntimeError):  # the loop has ended
            while piece := os.read(self._descriptor, _PIECE):
                *whole, rest = (held + piece).split(b"\n")
                for line in whole:
                    self._put(_TOO_LONG if is_too_long else f"{line.decode(errors='replace')}\n")
                    is_too_long = False
                is_too_long = is_too_long or len(rest) > self._most
                held = b"" if is_too_long else rest
            self._put(None)

    def _put(self, line: str | None) -> None:
        asyncio.run_coroutine_threadsafe(self._queue.put(line), self._loop).result()
