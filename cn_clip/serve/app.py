"""The FastAPI application: routes, errors in OpenAI's form, and the middleware around them."""

import contextlib
import functools
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from prometheus_client import Counter, Histogram
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cn_clip import __version__
from cn_clip.serve import dialects, immich
from cn_clip.serve.access import COOKIE, SESSION_SECONDS, Access, session_of
from cn_clip.serve.batching import Metrics
from cn_clip.serve.gate import Gate
from cn_clip.serve.index_routes import add_index_routes
from cn_clip.serve.runner import Runner
from cn_clip.serve.schemas import (
    ERRORS,
    TAG_MARK,
    ClassifyRequest,
    ClassifyResponse,
    ErrorResponse,
    JsonRoute,
    ModelCard,
    ModelList,
    RefusalError,
    invalid_field,
)
from cn_clip.serve.service import Service

SUMMARY = """Vectors of pictures and Chinese text, zero-shot classification, and search over an index.

Errors have OpenAI's form. Pictures are read from the request alone, never from an address."""
# The client left before it was answered; no client ever sees it.
CLIENT_LEFT = 499


def create_app(
    service: Service, metrics: Metrics, *, access: Access | None = None, second: immich.SecondServer | None = None
) -> FastAPI:
    """The application. It opens the model when it starts, and answers 503 until then; further pages may be mounted.

    service: what the routes do, also at `app.state.service`. access: who may ask; default: this machine alone.
    second: who does Immich's tasks other than vectors.
    """
    access = access or Access()

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        for runner in service.runners:
            runner.start(functools.partial(service.prepare, runner))
        service.collections.watch()
        try:
            yield
        finally:
            service.collections.end()
            for runner in service.runners:
                await runner.stop()
            if second is not None:
                await second.close()

    # The pages /docs and /redoc would load their scripts from elsewhere.
    app = FastAPI(title="cn-clip", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.router.route_class = JsonRoute
    app.state.service = service
    dialects.add_routes(app, service)
    immich.add_routes(app, service, second)
    _add_model_routes(app, service)
    add_index_routes(app, service)
    _add_probes(app, service, metrics)
    _add_error_handlers(app)
    _add_session_routes(app, access)
    _describe(app, access.root_path)
    paths = frozenset(path for route in app.routes if (path := getattr(route, "path", None)))
    app.add_middleware(Gate, limits=service.limits, access=access, shortcuts=dialects.shortcuts(service))
    app.add_middleware(Measured, metrics=metrics, routes=paths)
    if access.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=access.origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Api-Key", "Range", "If-None-Match"],
            expose_headers=["X-Ignored-Fields", "Retry-After", "ETag", "Content-Range"],
        )
    return app


def _add_model_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/classify", responses=ERRORS)
    async def classify(request: ClassifyRequest) -> ClassifyResponse:
        """How probable each label is for a picture."""
        return await service.classify(request)

    def card(runner: Runner) -> ModelCard:
        runner.check_ready()
        encoder = runner.encoder
        return ModelCard(
            id=runner.name,
            created=0,
            owned_by="cn_clip",
            embed_dim=encoder.embed_dim,
            resolution=encoder.resolution,
            context_length=encoder.context_length,
            backend=encoder.backend_name,
            precision=encoder.facts.precision,
            auto=None if encoder.decision is None else str(encoder.decision),
        )

    @app.get("/v1/models", responses=ERRORS)
    async def models() -> ModelList:
        """The models that are served, the first of which is meant by requests that name none."""
        return ModelList(data=[card(runner) for runner in service.runners])

    @app.get("/v1/models/{model:path}", responses=ERRORS)
    async def model(model: str) -> ModelCard:
        """A model, by its name."""
        return card(service.runner_of(model))


def _add_session_routes(app: FastAPI, access: Access) -> None:
    @app.post("/v1/session", status_code=204, response_class=Response, responses=ERRORS)
    async def begin(request: Request) -> Response:
        """Gives a browser that sends the key a cookie in place of it, so that pictures load by their addresses."""
        if access.api_key is None:
            raise RefusalError(404, "this server has no key, so no session is needed", code="no_key")
        access.check_key(request.scope)
        response = Response(status_code=204)
        is_secure = "https" in (request.url.scheme, request.headers.get("origin", "").partition(":")[0])
        response.set_cookie(
            COOKIE,
            access.sessions.begin(),
            max_age=SESSION_SECONDS,
            path=f"{access.root_path}/",
            secure=is_secure,
            httponly=True,
            samesite="strict",
        )
        return response

    @app.delete("/v1/session", status_code=204, response_class=Response, responses=ERRORS)
    async def end(request: Request) -> Response:
        """Ends the session of the cookie."""
        access.sessions.end(session_of(request.headers))
        response = Response(status_code=204)
        response.delete_cookie(COOKIE, path=f"{access.root_path}/", httponly=True, samesite="strict")
        return response


def _add_probes(app: FastAPI, service: Service, metrics: Metrics) -> None:
    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", responses={503: {"model": ErrorResponse}})
    async def readyz() -> dict[str, str]:
        """Whether the models are open, batches are computed, pictures decoded, and the indexes answer."""
        for runner in service.runners:
            runner.check_moving()
        for opened in service.collections:
            opened.circuit.check()
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def prometheus() -> Response:
        """Counters for Prometheus."""
        return Response(metrics.text(), media_type=Metrics.CONTENT_TYPE)


def _add_error_handlers(app: FastAPI) -> None:
    async def refused(_: Request, error: Exception) -> Response:
        if isinstance(error, RefusalError):
            return error.response()
        if isinstance(error, RequestValidationError):
            return _invalid(error).response()
        if isinstance(error, HTTPException):
            # FastAPI's own for a body that is no JSON, not even a faulty one.
            code = "invalid_json" if error.status_code == 400 else None
            response = RefusalError(error.status_code, str(error.detail), code=code).response()
            response.headers.update(error.headers or {})
            return response
        return RefusalError(500, f"the server failed ({type(error).__name__}); its log tells why").response()

    for kind in (RefusalError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, refused)


def _invalid(error: RequestValidationError) -> RefusalError:
    """400 with the first fault, its path written as `input[3].image`."""
    first = error.errors()[0]
    path = first["loc"][1:]
    if first["type"] == "json_invalid":
        return RefusalError(400, f"the body is not valid JSON: {first['ctx']['error']}", code="invalid_json")
    if not any(not str(one).startswith(TAG_MARK) for one in path):
        message = f"expected a JSON object, sent with the header Content-Type: application/json ({first['msg']})"
        return RefusalError(400, message, code="invalid_json")
    return invalid_field(path, first["msg"])


def _describe(app: FastAPI, root_path: str) -> None:
    """Makes /openapi.json tell the statuses that there are: faulty fields are answered with 400, never 422."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title,
                version=app.version,
                summary="Chinese-CLIP",
                description=SUMMARY,
                routes=app.routes,
                servers=[{"url": root_path}] if root_path else None,
            )
            for methods in schema["paths"].values():
                for operation in methods.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(name, None)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


class Measured:
    """ASGI middleware: one count and one duration for each request."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: frozenset[str]) -> None:
        self.app, self.metrics, self.routes = app, metrics, routes
        # By route and status: looking them up takes several times as long as counting.
        self._counted: dict[tuple[str, int], tuple[Counter, Histogram]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status = time.perf_counter(), CLIENT_LEFT

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noting)
        except Exception:
            status = 500
            raise
        finally:
            # The pattern of the route: paths that strangers make up must not become labels.
            path = getattr(scope.get("route"), "path", scope["path"])
            route = path if path in self.routes else "other"
            counted = self._counted.get((route, status))
            if counted is None:
                counted = self.metrics.requests.labels(route, status), self.metrics.seconds.labels(route)
                self._counted[route, status] = counted
            counted[0].inc()
            counted[1].observe(time.perf_counter() - begin)
