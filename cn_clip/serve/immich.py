"""Immich's interface to machine learning: vectors of pictures and texts here, faces and words from a second server.

Immich names each model; its names are of its own list, so another one than those served here means the first.
"""

# D embedding

import itertools
import json
import logging
from typing import Annotated, Any, NamedTuple

import httpx
import orjson
from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field as FormField
from python_multipart.multipart import File, FormParser, parse_options_header

from cn_clip.clip.backends.base import Rows
from cn_clip.clip.picture_files import look
from cn_clip.serve.batching import joined
from cn_clip.serve.forms import ignored_header
from cn_clip.serve.limits import MAX_TEXT_CHARS, Limits
from cn_clip.serve.runner import Picture, Text
from cn_clip.serve.schemas import ERRORS, ErrorResponse, Name, RefusalError, shown
from cn_clip.serve.service import Service

logger = logging.getLogger(__name__)

# Bytes of `entries`, fields of a form, tasks of a request, and bytes of the second server's answer.
MAX_ENTRIES_BYTES, MAX_FIELDS, MAX_TASKS, MAX_ANSWER_BYTES = 64 << 10, 8, 16, 8 << 20
# Requests at a time to the second server.
MAX_FORWARDED = 16
CLIP = "clip"
# The size of a picture, beside the answers of the tasks.
SIZE = ("imageHeight", "imageWidth")
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["entries"],
                    "properties": {
                        "entries": {
                            "type": "string",
                            "description": 'What is asked, as JSON: {"clip": {"visual": {"modelName": …}}}',
                        },
                        "image": {"type": "string", "format": "binary"},
                        "text": {"type": "string"},
                    },
                }
            }
        },
    }
}


class Entry(BaseModel):
    """The model that is to do a step of a task."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model_name: Name = Field(alias="modelName")


_Tasks = Annotated[dict[Name, dict[Name, Entry]], Field(min_length=1, max_length=MAX_TASKS)]
_TASKS: TypeAdapter[dict[str, dict[str, Entry]]] = TypeAdapter(_Tasks)


class Asked(NamedTuple):
    """A request: its tasks as Immich wrote them, and the picture or the text that they are for."""

    tasks: dict[str, Any]
    picture: bytes | None
    text: str | None


class SecondServer:
    """Another server of Immich's interface, at an address of the operator; for one event loop."""

    def __init__(self, address: str, limits: Limits) -> None:
        self.address = address.rstrip("/")
        # No proxy of the environment, and no address that an answer names.
        self._client = httpx.AsyncClient(
            timeout=limits.timeout,
            limits=httpx.Limits(max_connections=MAX_FORWARDED),
            trust_env=False,
            follow_redirects=False,
        )

    async def close(self) -> None:
        """Ends the connections."""
        await self._client.aclose()

    async def answer(self, asked: Asked) -> dict[str, Any]:
        """What it answers; raises RefusalError (502) when that is none."""
        data = {"entries": json.dumps(asked.tasks)}
        files = None if asked.picture is None else {"image": asked.picture}
        if asked.text is not None:
            data["text"] = asked.text
        body = bytearray()
        try:
            async with self._client.stream("POST", f"{self.address}/predict", data=data, files=files) as response:
                response.raise_for_status()
                async for piece in response.aiter_bytes():
                    body += piece
                    if len(body) > MAX_ANSWER_BYTES:
                        raise ValueError(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
            found = orjson.loads(body)
            if not isinstance(found, dict):
                raise ValueError("no JSON object")
            orjson.dumps(found)  # has a TypeError for more levels than it writes, though it reads them
        except (httpx.HTTPError, ValueError, TypeError) as error:
            logger.error("%s: %s: %s", self.address, type(error).__name__, error)
            message = f"{', '.join(asked.tasks)}: the second server does not answer; this server's log tells why"
            raise RefusalError(502, message, code="forward_failed", retry_after=5) from error
        return {name: found[name] for name in (*asked.tasks, *SIZE) if name in found}


def add_routes(app: FastAPI, service: Service, second: SecondServer | None) -> None:
    """Adds the routes. second: who does the tasks other than `clip`."""

    @app.get("/ping", response_class=PlainTextResponse)
    async def ping() -> str:
        """What Immich asks from time to time."""
        service.runner.check_moving()
        return "pong"

    @app.post(
        "/predict",
        response_model=dict[str, Any],
        responses=ERRORS | {502: {"model": ErrorResponse}},
        openapi_extra=_FORM,
    )
    async def predict(request: Request) -> Response:
        """The vector of a picture or a text, and what the second server finds in the picture."""
        asked = await service.runner.call(_asked, request.headers.get("content-type", ""), await request.body())
        ours = asked.tasks.get(CLIP)
        theirs = {task: steps for task, steps in asked.tasks.items() if task != CLIP}
        if theirs and second is None:
            message = f"{', '.join(theirs)}: only {CLIP} is done here; start the server with --immich-forward ADDRESS"
            raise RefusalError(400, message[:500], param="entries", code="unsupported_value")
        waiting = [] if ours is None else [_vector(service, ours, asked)]
        if theirs and second is not None:
            waiting.append(second.answer(asked._replace(tasks=theirs)))
        found = {name: value for part in await joined(waiting) for name, value in part.items()}
        names = {entry["modelName"] for entry in (ours or {}).values()}
        ignored = [] if names <= {runner.name for runner in service.runners} else ["modelName"]
        return Response(orjson.dumps(found), media_type="application/json", headers=ignored_header(ignored))


async def _vector(service: Service, steps: dict[str, Any], asked: Asked) -> dict[str, Any]:
    """The answer to the task `clip`, with the size of a picture."""
    expected = {"visual": asked.picture, "textual": asked.text}
    if len(steps) != 1 or (kind := next(iter(steps))) not in expected:
        message = f"entries: expected one of visual and textual for {CLIP}, got {shown(list(steps))}"
        raise RefusalError(400, message, param="entries", code="invalid_value")
    if expected[kind] is None:
        field = "image" if kind == "visual" else "text"
        raise RefusalError(400, f"{field}: expected one for {CLIP}, {kind}", param=field, code="invalid_value")
    name = steps[kind]["modelName"]
    model = name if name in [runner.name for runner in service.runners] else None
    part = Text(asked.text or "") if asked.picture is None or kind == "textual" else Picture(asked.picture, "image")
    row_1D, _ = await service.embed([[part]], model=model)
    answer: dict[str, Any] = {CLIP: _listed(row_1D)}
    if isinstance(part, Picture) and asked.picture is not None:
        answer |= await service.runner.call(_size, asked.picture)
    return answer


def _listed(row_1D: Rows) -> str:
    """A vector as Immich hands it on to its database: a list of numbers in a string."""
    return orjson.dumps(row_1D[0], option=orjson.OPT_SERIALIZE_NUMPY).decode()


def _size(picture: bytes) -> dict[str, int]:
    head = look(picture)
    return {} if head is None else dict(zip(SIZE, (head.height, head.width), strict=True))


# --- the form


def _asked(content_type: str, body: bytes) -> Asked:
    """What a form asks; raises RefusalError (400)."""
    form = _fields(content_type, body)
    if len(form.get("entries", b"")) > MAX_ENTRIES_BYTES:
        raise _invalid("entries", f"expected at most {MAX_ENTRIES_BYTES} bytes")
    try:
        tasks = json.loads(form.get("entries", b""))
        _TASKS.validate_python(tasks)
    except (ValidationError, ValueError, RecursionError) as error:
        raise _invalid("entries", 'expected JSON such as {"clip": {"visual": {"modelName": "…"}}}') from error
    text = None if "text" not in form else form["text"].decode(errors="replace")
    if text is not None and not 0 < len(text) <= MAX_TEXT_CHARS:
        raise _invalid("text", f"expected a text of 1 to {MAX_TEXT_CHARS} characters, got {len(text)}")
    if text is None and "image" not in form:
        raise _invalid("image", "expected the field image or text")
    return Asked(tasks, form.get("image"), text)


def _fields(content_type: str, body: bytes) -> dict[str, bytes]:
    """The fields of a form, in memory, where its body is already; raises RefusalError (400)."""
    found, num_parts = dict[str, bytes](), itertools.count(1)

    def add(name: bytes | None, value: bytes | None) -> None:
        found[(name or b"").decode(errors="replace")] = value or b""
        if next(num_parts) > MAX_FIELDS:  # of one name too: to read a million parts takes minutes
            raise _invalid("entries", f"expected at most {MAX_FIELDS} fields")

    def add_file(file: File) -> None:
        file.file_object.seek(0)
        add(file.field_name, file.file_object.read())

    def add_field(field: FormField) -> None:
        add(field.field_name, field.value)

    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise _invalid("entries", "expected a form, as multipart/form-data with a boundary")
    config = {"MAX_MEMORY_FILE_SIZE": len(body) + 1}
    try:
        parser = FormParser("multipart/form-data", add_field, add_file, boundary=options[b"boundary"], config=config)
        parser.write(body)
        parser.finalize()
    except (FormParserError, ValueError) as error:
        raise _invalid("entries", f"the form cannot be read: {error}") from error
    return found


def _invalid(field: str, message: str) -> RefusalError:
    return RefusalError(400, f"{field}: {message}", param=field, code="invalid_value")
