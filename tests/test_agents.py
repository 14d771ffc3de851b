"""`cn-clip mcp`: the tools that agents have, over the protocol's own client, and against requests of any kind."""

import asyncio
import base64
import functools
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from documents import ROOT
from PIL import Image
from serving import WatchedBackend, data_url, harmed

from cn_clip import cli, emoji_pack
from cn_clip.retrieval import addresses
from cn_clip.retrieval.manifest import Manifest, ModelInfo
from cn_clip.retrieval.schemes import IndexAddress
from cn_clip.retrieval.store import open_index
from cn_clip.retrieval.writer import NewItem, open_writer
from cn_clip.serve.agent_tools import MAX_RESULTS, AgentTools, Answer, Jpeg
from cn_clip.serve.batching import Metrics
from cn_clip.serve.collections import Collections, Opened
from cn_clip.serve.limits import Limits
from cn_clip.serve.runner import Runner
from cn_clip.serve.schemas import RefusalError
from cn_clip.serve.service import Service

TOOLS = ("search", "similar", "thumbnail", "classify", "index_facts")
ODD_NAME = "两\udce4只.jpg"  # as a disk gives a name that is no UTF-8


def jpeg(side: int = 400) -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((side, side // 2), 50).save(stream, "JPEG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six items, one without a thumbnail, one with a thumbnail that is none, one with a long caption."""
    target = tmp_path_factory.mktemp("agents") / "photos"
    names: list[int | str] = ["a/猫.jpg", "b.jpg", 7, ODD_NAME, "none.jpg", "text.jpg"]
    thumbnails = [jpeg(), jpeg(100), jpeg(), jpeg(), b"", b"no picture"]
    items = [
        NewItem(
            name,
            np.eye(4, dtype=np.float32)[number % 4] if number < 4 else np.full(4, 0.5, dtype=np.float32),
            {"source": "/secret", "path": f"/secret/{number}.jpg", "digest": "d", "caption": "长" * 1000},
            thumbnails[number],
        )
        for number, name in enumerate(names)
    ]
    with open_writer(target, Manifest(ModelInfo("tiny", "fingerprint", 4))) as writer:
        writer.commit(items)
    return target


def asked(index: IndexAddress, ask: Callable[[AgentTools], Awaitable[None]], *, paths: bool = False) -> None:
    """Runs `ask` with the tools of the index."""

    async def run() -> None:
        limits = Limits(timeout=20)
        runner = Runner("tiny", lambda: harmed(WatchedBackend()), limits, Metrics())
        opened = addresses.open_index(index, is_served=True)
        collections = Collections([Opened("photos", opened, runner)])
        service = Service([runner], limits, collections, with_originals=paths)
        runner.start(functools.partial(service.prepare, runner))
        try:
            await ask(AgentTools(service))
        finally:
            await runner.stop()

    asyncio.run(run())


async def refused(tools: AgentTools, name: str, **arguments: Any) -> str:
    with pytest.raises(RefusalError) as caught:
        await tools.call(name, arguments)
    assert "\n" not in caught.value.message
    return caught.value.message


def read(answer: Answer) -> dict[str, Any]:
    assert isinstance(answer, dict)
    return json.loads(json.dumps(answer, allow_nan=False, ensure_ascii=False).encode())  # type: ignore[no-any-return]


def test_results_say_what_is_found_and_nothing_of_this_machine(index: Path) -> None:
    async def ask(tools: AgentTools) -> None:
        found = read(await tools.call("search", {"query": "一只猫"}))
        assert (found["index"], found["model"], len(found["results"])) == ("photos", "tiny", 6)
        best = found["results"][0]
        assert (best["id"], best["score"]) == ("a/猫.jpg", 1.0)
        assert best["metadata"] == {"caption": "长" * 300 + "…"}
        assert "secret" not in json.dumps(found)
        alike = read(await tools.call("similar", {"id": "a/猫.jpg", "k": 2}))
        assert [one["id"] for one in alike["results"]] == ["none.jpg", "text.jpg"]
        (seven,) = read(await tools.call("similar", {"id": "7", "text": "夜里", "k": 1}))["results"]
        assert seven["id"] == "a/猫.jpg"  # the text alone points there, and 7 itself is left out
        facts = read(await tools.call("index_facts", None))["indexes"]
        assert (facts[0]["name"], facts[0]["count"], facts[0]["fields"]) == ("photos", 6, ["caption"])
        shown = await tools.call("thumbnail", {"id": "a/猫.jpg"})
        assert isinstance(shown, Jpeg)
        assert Image.open(io.BytesIO(shown.data)).size == (320, 160)
        labels = read(await tools.call("classify", {"image": data_url(jpeg(8), "jpeg"), "labels": ["猫", "一条狗"]}))
        assert {one["label"] for one in labels["data"]} == {"猫", "一条狗"}
        assert sum(one["probability"] for one in labels["data"]) == pytest.approx(1)

    asked(index, ask)


def test_paths_are_told_when_the_operator_says_so(index: Path) -> None:
    async def ask(tools: AgentTools) -> None:
        found = read(await tools.call("search", {"query": "一只猫", "k": 1}))
        assert found["results"][0]["metadata"] == {"path": "/secret/0.jpg", "caption": "长" * 300 + "…"}

    asked(index, ask, paths=True)


def test_what_cannot_be_done_is_one_sentence(index: Path) -> None:
    async def ask(tools: AgentTools) -> None:
        assert await refused(tools, "search") == "query: Field required"
        assert "less than or equal to 50" in await refused(tools, "search", query="猫", k=MAX_RESULTS + 1)
        assert "no tool 'shell'" in await refused(tools, "shell", command="ls")
        assert "Extra inputs" in await refused(tools, "search", query="猫", **{"a\nb": 1})
        assert "arguments: " in await refused(tools, "search", query="猫", **{"a\ud800": 1})
        for name in ("/etc/passwd", "http://localhost/a.png", "file:///etc/passwd"):
            assert "no URL or path is read" in await refused(tools, "classify", image=name, labels=["a"])
        for name in ("/etc/passwd", "../photos", 8):
            assert "no item" in await refused(tools, "thumbnail", id=name)
            assert "no item" in await refused(tools, "similar", id=name)
        assert "no thumbnail" in await refused(tools, "thumbnail", id="none.jpg")
        assert "no thumbnail" in await refused(tools, "thumbnail", id="text.jpg")
        assert "path is told only" not in await refused(tools, "search", query="猫", where="(((")
        assert "there is no 'others'" in await refused(tools, "search", query="猫", index="others")
        assert "either image or id" in await refused(tools, "classify", labels=["猫"])

    asked(index, ask)


@pytest.mark.milvus
def test_the_tools_ask_an_index_on_a_server_alike(index: Path) -> None:
    import milvus_server

    async def ask(tools: AgentTools) -> None:
        found = read(await tools.call("search", {"query": "一只猫", "k": 1}))
        assert [one["id"] for one in found["results"]] == ["a/猫.jpg"]
        assert found["results"][0]["metadata"] == {"caption": "长" * 300 + "…"}
        alike = read(await tools.call("similar", {"id": "7", "text": "夜里", "k": 1}))
        assert alike["results"][0]["id"] == "a/猫.jpg"
        facts = read(await tools.call("index_facts", {}))["indexes"][0]
        assert (facts["count"], facts["generation"], facts["fields"]) == (6, None, ["caption"])
        assert isinstance(await tools.call("thumbnail", {"id": "b.jpg"}), Jpeg)
        labels = read(await tools.call("classify", {"id": 7, "labels": ["猫", "一条狗"]}))
        assert len(labels["data"]) == 2
        assert "no item" in await refused(tools, "similar", id="nobody")

    with milvus_server.lite() as address:
        here = open_index(index)
        with addresses.open_writer(address, Manifest(ModelInfo("tiny", "fingerprint", 4))) as writer:
            small = here.thumbnails(here.ids)
            for ids, known, vectors in here.vector_blocks(10):
                rows = zip(ids, vectors, known, strict=True)
                writer.commit([NewItem(*row, small.get(row[0], b"")) for row in rows])
        milvus_server.release(address)
        asked(address, ask)


# --- requests of any kind

STRINGS = (
    *("", "猫", "a/猫.jpg", "7", "none.jpg", "../../etc/passwd", "http://127.0.0.1:1/x.png", "file:///etc/passwd"),
    *("x" * 5000, "\0", "\n", "‮", "𠀀" * 100, "data:", "data:image/png;base64,", "data:image/png;base64,AAAA", "((("),
    *("width>=1", "caption~长 or not id=7", "path~secret", "photos", "{}", "'; --", "NaN", "1e999", "<script>"),
)
VALUES = (None, True, False, 0, 1, -1, 7, 50, 51, 2**63, 10**400, 0.5, -1.5, 1e308, [], {}, [[]], {"a": {"b": []}})


def any_value(draw: random.Random, depth: int = 2) -> Any:
    kind = draw.randrange(6)
    if kind < 3:
        return draw.choice(STRINGS)
    if kind == 3 and depth:
        return [any_value(draw, depth - 1) for _ in range(draw.randrange(4))]
    return draw.choice(VALUES)


def any_call(draw: random.Random, schemas: dict[str, list[str]], item: str = "a/猫.jpg") -> tuple[str, dict[str, Any]]:
    """A tool and arguments; many of the calls are nearly right. item: an id of the index."""
    name = draw.choice([*TOOLS, *TOOLS, "tool", "", "搜索"])
    usual = {"query": "一只猫", "id": item, "k": 3, "labels": ["猫", "狗"], "where": "not id=nobody"}
    fields = schemas.get(name, list(usual))
    arguments = {field: usual[field] for field in fields if field in usual and draw.random() < 0.8}
    for _ in range(draw.randrange(3)):
        arguments[draw.choice([*fields, "index", "path", "k", draw.choice(STRINGS)[:20]])] = any_value(draw)
    if draw.random() < 0.01:
        arguments["image"] = data_url(jpeg(draw.choice([8, 9, 30])), "jpeg")
    return name, arguments


def test_calls_of_any_kind_are_answered_or_refused_in_one_line(index: Path) -> None:
    draw = random.Random(0)
    answers = {"answered": 0, "refused": 0}

    async def ask(tools: AgentTools) -> None:
        schemas = {name: list(tool.request.model_fields) for name, tool in tools.tools.items()}
        for _ in range(2000):
            name, arguments = any_call(draw, schemas)
            answer: Answer | RefusalError
            try:
                answer = await tools.call(name, arguments)
            except RefusalError as error:
                answer = error
            if isinstance(answer, RefusalError):
                assert answer.status != 500, (name, arguments, answer.message)
                assert len(answer.message.encode().decode().splitlines()) == 1
                assert len(answer.message) < 1100
            else:
                assert isinstance(answer, Jpeg) or len(json.dumps(read(answer))) < 200_000
            answers["refused" if isinstance(answer, RefusalError) else "answered"] += 1

    asked(index, ask)
    assert min(answers.values()) > 200


# --- over the protocol

COMMAND = [sys.executable, "-m", "cn_clip", "mcp"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CN_CLIP_LANGUAGE": "en"}


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of 28 pictures, of the bundled model."""
    folder = tmp_path_factory.mktemp("emoji")
    (folder / "pictures").mkdir()
    for one in emoji_pack.load()[::60]:
        (folder / "pictures" / f"{one.name}.png").write_bytes(one.picture)
    arguments = ["index", "build", str(folder / "pictures"), "--output", str(folder / "emoji"), "--model", "Emoji-Tiny"]
    cli.main(arguments)
    return folder / "emoji"


@pytest.mark.clients
def test_the_client_of_the_protocol_lists_and_calls_every_tool(emoji: Path) -> None:
    from mcp.client import Client
    from mcp.client.stdio import StdioServerParameters

    async def ask() -> None:
        server = StdioServerParameters(command=COMMAND[0], args=[*COMMAND[1:], str(emoji)], env=ENVIRONMENT)
        async with Client(server) as client:
            tools = (await client.list_tools()).tools
            assert [tool.name for tool in tools] == list(TOOLS)
            assert all(tool.input_schema["additionalProperties"] is False for tool in tools)
            assert all(tool.annotations and tool.annotations.read_only_hint for tool in tools)
            found = (await client.call_tool("search", {"query": "一只猫", "k": 3})).structured_content
            assert found is not None
            first = found["results"][0]["id"]
            assert "猫" in first
            alike = (await client.call_tool("similar", {"id": first, "k": 2})).structured_content
            assert alike is not None
            assert [one["id"] != first for one in alike["results"]] == [True, True]
            (shown,) = (await client.call_tool("thumbnail", {"id": first})).content
            assert shown.type == "image"
            assert Image.open(io.BytesIO(base64.b64decode(shown.data))).format == "JPEG"
            labels = (await client.call_tool("classify", {"id": first, "labels": ["狗", "猫"]})).structured_content
            assert labels is not None
            assert labels["data"][0]["label"] == "猫"
            facts = await client.call_tool("index_facts", {})
            assert json.loads(facts.content[0].text)["indexes"][0]["count"] == 28
            wrong = await client.call_tool("thumbnail", {"id": "../../etc/passwd"})
            assert wrong.is_error
            assert wrong.content[0].text == "id: the index has no item '../../etc/passwd'"

    asyncio.run(ask())


@pytest.mark.clients
def test_ten_thousand_calls_of_any_kind_do_not_end_the_server(emoji: Path) -> None:
    draw = random.Random(1)
    item = str(next(iter(open_index(emoji).items()))[0])
    with subprocess.Popen(
        [*COMMAND, str(emoji)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT
    ) as process:
        assert process.stdin
        assert process.stdout

        def send(line: str) -> None:
            process.stdin.write(f"{line}\n".encode(errors="surrogatepass"))
            process.stdin.flush()

        def answer() -> dict[str, Any]:
            line = process.stdout.readline()
            assert line, "the server has ended"
            return json.loads(line)  # type: ignore[no-any-return]

        about = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "fuzz", "version": "1"}}
        send(json.dumps({"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": about}))
        assert answer()["result"]["serverInfo"]["name"] == "cn-clip"
        send(json.dumps({"jsonrpc": "2.0", "method": "notifications/initialized"}))
        send(json.dumps({"jsonrpc": "2.0", "id": 0, "method": "tools/list"}))
        schemas = {one["name"]: list(one["inputSchema"]["properties"]) for one in answer()["result"]["tools"]}
        counts = {"answered": 0, "refused": 0, "error": 0}
        for number in range(1, 10_001):
            if number % 10 == 0:  # what is no request; most of it has no answer
                send(draw.choice(["", "{", "null", "[]", '{"jsonrpc": "1.0"}', "\0\ufffd", '"\\ud800"', "x" * 100_000]))
            name, arguments = any_call(draw, schemas, item)
            params = {"name": name, "arguments": arguments}
            send(json.dumps({"jsonrpc": "2.0", "id": number, "method": "tools/call", "params": params}))
            while (got := answer()).get("id") != number:
                assert "error" in got
            if "error" in got:
                counts["error"] += 1
            else:
                counts["refused" if got["result"].get("isError") else "answered"] += 1
        print(f"10,000 calls: {counts}")
        send("x" * (40 << 20))
        send(json.dumps({"jsonrpc": "2.0", "id": "last", "method": "tools/list"}))
        while (got := answer()).get("id") != "last":
            assert "error" in got
        assert len(got["result"]["tools"]) == len(TOOLS)
        process.stdin.close()
        assert process.wait(30) == 0
    assert min(counts["answered"], counts["refused"]) > 1000


@pytest.mark.clients
def test_what_cannot_be_opened_ends_the_command_with_one_line(tmp_path: Path, emoji: Path) -> None:
    (tmp_path / "bad.pt").write_bytes(b"no weights")
    for arguments, reason in (
        ([], "INDEX: expected one or more indexes"),
        ([str(tmp_path / "none")], "none: is no index"),
        ([str(emoji), "--model", str(tmp_path / "bad.pt")], "bad.pt: is text, not weights"),
    ):
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        with subprocess.Popen([*COMMAND, *arguments], env=ENVIRONMENT, **pipes) as process:
            assert process.stdout
            assert process.stderr
            assert process.wait(60) != 0  # the agent has not closed its end
            assert process.stdout.read() == b""
            assert reason in process.stderr.read().decode().splitlines()[-1]
