"""The routes of the indexes: search, what there is, in which order, small pictures and files of the items."""

from typing import Annotated, Literal

from fastapi import FastAPI, Path, Query, Request, Response
from fastapi.responses import FileResponse
from starlette.types import Receive, Scope, Send

from cn_clip.retrieval.listing import Order
from cn_clip.serve.items import Original, Size, etag_of, is_known
from cn_clip.serve.limits import MAX_K, MAX_NAME_CHARS, MAX_OFFSET, MAX_TEXT_CHARS
from cn_clip.serve.schemas import ERRORS, IndexList, ItemList, SearchRequest, SearchResponse
from cn_clip.serve.service import Service

_Id = Annotated[str, Path(max_length=4096)]
_Index = Annotated[str | None, Query(max_length=MAX_NAME_CHARS, description="Its name; default: the first")]
_As = Annotated[Literal["jpeg"] | None, Query(alias="as", description="jpeg: made of the file, if it is a picture")]
_PICTURE = {**ERRORS, 200: {"content": {"image/jpeg": {}}}, 304: {"description": "The one that the client has"}}
_FILE = {**_PICTURE, 200: {"content": {"image/*": {}}}, 206: {"description": "A part of it"}}


def add_index_routes(app: FastAPI, service: Service) -> None:
    """Adds them; `service` answers."""

    @app.post("/v1/search", responses=ERRORS)
    async def search(request: SearchRequest, index: _Index = None) -> SearchResponse:
        """The items of an index that are nearest to the query."""
        opened, hits = await service.search(request, index)
        return SearchResponse(model=opened.runner.name, index=opened.name, data=hits)

    @app.get("/v1/index", responses=ERRORS)
    async def indexes() -> IndexList:
        """The indexes that are open."""
        return IndexList(data=await service.cards())

    @app.get("/v1/index/items", responses=ERRORS)
    async def items(
        index: _Index = None,
        order: Order = "newest",
        where: Annotated[str | None, Query(min_length=1, max_length=MAX_TEXT_CHARS)] = None,
        offset: Annotated[int, Query(ge=0, le=MAX_OFFSET)] = 0,
        limit: Annotated[int, Query(ge=1, le=MAX_K)] = 50,
        metadata: Literal["shown", "all"] = "shown",
    ) -> ItemList:
        """Items without a query, in an order that the index has."""
        opened, total, hits = await service.listed(
            index, order, where=where, offset=offset, limit=limit, metadata=metadata
        )
        return ItemList(index=opened.name, total=total, data=hits)

    @app.get("/v1/index/thumbnails/{item_id:path}", response_class=Response, responses=_PICTURE)
    async def thumbnail(request: Request, item_id: _Id, index: _Index = None, size: Size = "large") -> Response:
        """A small picture of an item: of at most 160 pixels a side, of 320, or as it is kept."""
        data = await service.thumbnail(item_id, index)
        headers = {"ETag": etag_of(data, size), "Cache-Control": "private, no-cache"}
        if is_known(request, headers["ETag"]):
            return Response(status_code=304, headers=headers)
        small = await service.smaller(data, size, headers["ETag"])
        return Response(small, media_type="image/jpeg", headers=headers)

    @app.get("/v1/index/items/{item_id:path}", response_class=Response, responses=_FILE)
    async def original(request: Request, item_id: _Id, index: _Index = None, shown_as: _As = None) -> Response:
        """The file that an item was made of, or a range of its bytes; or a JPEG of it, for those that no browser shows.

        The JPEG is upright, and of at most 2048 pixels a side.
        """
        found = await service.original(item_id, index)
        if shown_as is None:
            return _File(found)
        found.check_picture()
        headers = {"ETag": found.jpeg_etag, "Cache-Control": "private, no-cache"}
        if is_known(request, headers["ETag"]):
            return Response(status_code=304, headers=headers)
        # Not closed here: a request that is given up may leave while its file is read.
        return Response(await service.runner.jpeg(found.read, "id"), media_type="image/jpeg", headers=headers)


class _File(FileResponse):
    """The bytes of an original, which is closed after them."""

    def __init__(self, original: Original) -> None:
        super().__init__(
            original.path,
            media_type=original.media_type,
            filename=original.name,
            stat_result=original.facts,
            content_disposition_type="inline",
            # A file that claims to be a picture runs nothing, and asks for nothing.
            headers={
                "Cache-Control": "private, no-cache",
                "Content-Security-Policy": "default-src 'none'; media-src 'self'; sandbox; frame-ancestors 'self'",
            },
        )
        self._original = original

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._original.close()
