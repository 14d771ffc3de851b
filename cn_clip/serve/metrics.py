"""What Prometheus reads at /metrics, and the middleware that counts requests."""

import time
from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# The client left before it was answered; no client ever sees it.
CLIENT_LEFT = 499
_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """The counters of one service, in a registry of their own."""

    CONTENT_TYPE = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "cn_clip_requests", "Requests by route and HTTP status", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "cn_clip_request_seconds",
            "Time from the head of a request to the end of its answer",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.batch_size = Histogram(
            "cn_clip_batch_size",
            "Inputs that were computed together",
            ["inputs"],
            buckets=_BATCH_SIZES,
            registry=self.registry,
        )
        self.queue_depth = Gauge(
            "cn_clip_queue_depth", "Inputs admitted and not yet done", ["inputs"], registry=self.registry
        )

    def watch_queue(self, inputs: str, depth: Callable[[], float]) -> None:
        """Reads the depth of a queue whenever it is asked for."""
        self.queue_depth.labels(inputs).set_function(depth)

    def observe_batch(self, inputs: str) -> Callable[[int], None]:
        """What to tell the size of each batch."""
        batch_size = self.batch_size.labels(inputs)
        return lambda size: batch_size.observe(size)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)


class Measured:
    """ASGI middleware: one count and one duration for each request."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: frozenset[str]) -> None:
        self.app, self.metrics, self.routes = app, metrics, routes

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
            route = self._route(scope)
            self.metrics.requests.labels(route, status).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - begin)

    def _route(self, scope: Scope) -> str:
        """The pattern of the route: paths that strangers make up must not become labels."""
        path = getattr(scope.get("route"), "path", scope["path"])
        return path if path in self.routes else "other"
