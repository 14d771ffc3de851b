"""What the service answers when it cannot do what it was asked: one exception, in the form of OpenAI's errors."""

from typing import Any

from fastapi.responses import JSONResponse

# Characters of a message, and of what it shows of a request.
_MOST_CHARS = 1000
_SHOWN_CHARS = 80


class RefusalError(Exception):
    """An answer with an HTTP status of 400 or more.

    param: the field of the request that is at fault. retry_after: seconds after which to ask again.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        message, param = message[:_MOST_CHARS], param and param[:_SHOWN_CHARS]
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def response(self) -> JSONResponse:
        """The answer."""
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self._body(), self.status, headers)

    def _body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def shown(value: object) -> str:
    """What a request named, as a message may repeat it."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…"


def queue_full(what: str, limit: int) -> RefusalError:
    """503: as many of `what` as admitted are waiting."""
    return RefusalError(503, f"the queue of {limit} {what} is full; ask again later", code="queue_full", retry_after=1)
