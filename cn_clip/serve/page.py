"""The web page of the service: static files of the package, whose scripts ask the routes of the server they came from.

The files are the same for everyone and hold nothing of the index, so they need no key; what they ask for does.
"""

import hashlib
from pathlib import Path

from fastapi import FastAPI, Request, Response

from cn_clip.serve.gate import PAGE_PREFIX
from cn_clip.serve.items import is_known
from cn_clip.serve.schemas import RefusalError

WEB = Path(__file__).with_name("web")
INDEX, ICON = "index.html", "icon.svg"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# No address but that of the server, nothing that stands inside the markup: a name of a file can never become a script.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src 'self'; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
)


def mount(app: FastAPI) -> None:
    """Adds the page: its document at /, the files that it loads below `PAGE_PREFIX`."""
    files = {path.name: path.read_bytes() for path in WEB.iterdir() if path.suffix in _TYPES}
    etags = {name: f'"{hashlib.sha256(data).hexdigest()[:20]}"' for name, data in files.items()}

    def answer(request: Request, name: str) -> Response:
        if name not in files:
            raise RefusalError(404, "Not Found", code="not_found")
        headers = {
            # A browser asks each time whether the file is still the same, so that a new version is there at once.
            "Cache-Control": "no-cache",
            "Content-Security-Policy": POLICY,
            "Content-Type": _TYPES[Path(name).suffix],
            "ETag": etags[name],
            "Referrer-Policy": "same-origin",
        }
        if is_known(request, etags[name]):
            return Response(status_code=304, headers=headers)
        return Response(files[name], headers=headers)

    methods = ["GET", "HEAD"]

    @app.api_route("/", methods=methods, include_in_schema=False)
    async def root(request: Request) -> Response:
        return answer(request, INDEX)

    @app.api_route("/favicon.ico", methods=methods, include_in_schema=False)
    async def icon(request: Request) -> Response:
        return answer(request, ICON)

    @app.api_route(f"{PAGE_PREFIX}{{name}}", methods=methods, include_in_schema=False)
    async def file(request: Request, name: str) -> Response:
        return answer(request, name)
