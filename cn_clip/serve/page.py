"""The web page of the service, made with Gradio: search by text and by picture, zero-shot labels, facts of the model.

Its handlers ask the same `Service` as the HTTP routes, with the same requests, so the same bounds hold. It loads
nothing from elsewhere and reports nothing to anyone.
"""

import asyncio
import base64
import contextlib
import html
import json
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import gradio as gr
from fastapi import FastAPI
from fastapi.responses import RedirectResponse, Response
from pydantic import ValidationError
from starlette.middleware import Middleware

from cn_clip.files import HeldFolder
from cn_clip.serve.app import thumbnail_path
from cn_clip.serve.limits import (
    MAX_K,
    MAX_LABELS,
    MAX_TEMPLATES,
    MAX_TEXT_CHARS,
    UPLOADS_HELD,
    VISITORS_HELD,
)
from cn_clip.serve.schemas import ClassifyRequest, QueryPart, RefusalError, SearchRequest
from cn_clip.serve.service import Service
from cn_clip.serve.uploads import REFUSED, Door, Uploads, held_folder, one_line

log = logging.getLogger(__name__)

PATH = "/page"
MOST_SHOWN = 100
MOST_LABELS_SHOWN = 10
# The field of an item that names it; where it has none, the name of its file does.
CAPTION = "caption"
_FONTS = ("system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif")


ICON = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">
<rect width="16" height="16" rx="3" fill="#6366f1"/>
<g fill="none" stroke="#fff" stroke-width="1.8"><circle cx="7" cy="7" r="3.5"/><path d="M9.6 9.6l3 3"/></g></svg>"""
STYLE = Path(__file__).with_name("page.css")

# --- what it says

TITLE = "cn-clip · 中文图文检索 / Chinese CLIP"
PHRASES = ("小猫", "下雨天", "生日蛋糕", "想吃水果", "晚上的月亮", "坐飞机")
LABELS = ("猫", "狗", "鸟", "鱼", "花", "水果", "蛋糕", "汽车", "飞机", "船", "月亮", "心")
TEMPLATES = ("一张{}的图片", "{}")

NO_INDEX = (
    "启动时没有给出索引，所以不能搜图；另外两页照常可用。先建索引，再带着它启动 / No index was opened, so there is "
    "nothing to search. Build one, and start with it:\n\n"
    "```\ncn-clip index build 图片文件夹 --output photos.index\ncn-clip serve photos.index\n```"
)
SOFTMAX = (
    "概率假定答案就在标签里；可能都不是时，加一个“其他”之类的标签。 / "
    "The probabilities take it for granted that one of the labels is right."
)
NOTHING_FOUND = "没有达到最低分的图片 / no picture reaches the minimum score"
NO_TEXT = "请先写一句话 / write a phrase first"
NO_PICTURE = "请先放一张图片 / drop a picture first"
TIMEOUT = "没有在限定的时间内算完，请稍后再试 / not answered in time; try again later"
FAILED = "服务器出错，原因在它的日志里 / the server failed; its log tells why"

# By the first field at fault.
FAULTS = {
    "query": f"文字请写 1 到 {MAX_TEXT_CHARS} 个字 / 1 to {MAX_TEXT_CHARS} characters, please",
    "labels": (
        f"标签一行一个，1 到 {MAX_LABELS} 个，每个不超过 {MAX_TEXT_CHARS} 个字 / "
        f"1 to {MAX_LABELS} labels, one a line, of at most {MAX_TEXT_CHARS} characters"
    ),
    "templates": (
        f"模板一行一个，1 到 {MAX_TEMPLATES} 个，每个要有且只有一处 {{}} / "
        f"1 to {MAX_TEMPLATES} templates, one a line, each with exactly one {{}}"
    ),
    "k": f"张数应为 1 到 {MAX_K} 的整数 / k: a whole number from 1 to {MAX_K}",
    "min_score": "最低分应在 -1 到 1 之间 / minimum score: from -1 to 1",
}
# By the code of the refusal; what the service itself says stands behind.
REFUSALS = {
    "not_ready": "模型还没打开，请稍后再试",
    "queue_full": "排队的请求太多，请稍后再试",
    "timeout": "没有在限定的时间内算完，请稍后再试",
    "image_too_large": "图片的像素太多",
    "invalid_image": "读不出这张图片",
    "no_upload": "只读取上传的图片，不读路径和网址",
    "index_not_found": "启动时没有给出索引",
    "too_many_items": "标签和模板太多",
}


# --- what it shows


class Answers:
    """What the page shows, apart from Gradio. All methods raise RefusalError, or ValidationError naming a field.

    path: of an upload, as the request wrote it, which may be anything; None for no picture.
    """

    def __init__(self, service: Service, uploads: Uploads, facts: Mapping[str, object]) -> None:
        self.service, self.uploads, self._facts = service, uploads, facts

    async def by_text(self, text: str, k: float, min_score: float) -> str:
        """The hits of a phrase as HTML. min_score: -1 for any."""
        if not text.strip():
            raise RefusalError(400, NO_TEXT)
        return await self._search([QueryPart(text=text)], k, min_score)

    async def by_picture(self, path: object, text: str, share: float, k: float) -> str:
        """The hits of an uploaded picture, mixed with a phrase. share: weight of the phrase, 0 to 1."""
        parts = [QueryPart(image=await self._data_url(path), weight=1 - share if text.strip() else 1)]
        if text.strip():
            parts.append(QueryPart(text=text, weight=share))
        return await self._search(parts, k, None)

    async def labels(self, path: object, labels: str, templates: str) -> dict[str, float]:
        """The probability of each label. labels, templates: one a line."""
        request = ClassifyRequest(image=await self._data_url(path), labels=_lines(labels), templates=_lines(templates))
        answer = await self.service.classify(request)
        return {one.label: one.probability for one in answer.data}

    async def facts(self) -> str:
        """What there is to know of the model and the index, as HTML."""
        encoder, index = self.service.runner.encoder, self.service.index
        count = "无索引 / no index" if index is None else f"{await self.service.ask_index(len, index):,}"
        rows: dict[str, object] = {
            "模型 / model": self.service.runner.name,
            **self._facts,
            "图片边长 / resolution": f"{encoder.resolution} px",
            "向量维数 / dimensions": encoder.embed_dim,
            "文本长度 / context length": f"{encoder.context_length} tokens",
            "索引里的图片 / pictures in the index": count,
        }
        cells = (
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>" for name, value in rows.items()
        )
        return f'<table class="facts">{"".join(cells)}</table>'

    async def _search(self, parts: list[QueryPart], k: float, min_score: float | None) -> str:
        hits = await self.service.search(SearchRequest(query=parts, k=int(k), min_score=min_score, where=None))
        if not hits:
            return f"<p>{html.escape(NOTHING_FOUND)}</p>"
        figures = []
        for hit in hits:
            caption = hit.metadata.get(CAPTION)
            name = html.escape(str(caption) if caption else PurePosixPath(str(hit.id)).stem)
            picture = f'<img src="..{html.escape(thumbnail_path(hit.id))}" alt="{name}">' if hit.has_thumbnail else "—"
            figures.append(
                f'<figure title="{html.escape(str(hit.id))}"><div class="picture">{picture}</div><figcaption>'
                f'<span class="name">{name}</span> <span class="score">{hit.score:.3f}</span></figcaption></figure>'
            )
        return f'<div class="hits">{"".join(figures)}</div>'

    async def _data_url(self, path: object) -> str:
        if path is None:
            raise RefusalError(400, NO_PICTURE)
        data = await self.service.runner.call(self.uploads.read, path)
        return f"data:;base64,{base64.b64encode(data).decode()}"


def mount(app: FastAPI, service: Service, facts: Mapping[str, object]) -> None:
    """Mounts the page at `PATH`, where / leads. facts: more of the model, by what they are called.

    Not for a thread with a running event loop: Gradio, which leaves loops of its own unclosed where it finds none,
    gets one here.
    """

    async def mounted() -> None:
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        # Gradio's own folder is one for all users of a machine.
        folder = held_folder()
        os.environ["GRADIO_TEMP_DIR"] = str(folder.path)
        largest = service.limits.max_body_bytes
        uploads = Uploads(folder.path, most_bytes=UPLOADS_HELD * largest, largest=largest)
        blocks = _blocks(Answers(service, uploads, facts))
        _fetch_nothing(blocks, uploads)
        _log_one_line(blocks)
        # Gradio keeps a copy of the page's settings for each visitor, 100 KB, which the page never reads.
        blocks.state_session_capacity = VISITORS_HELD
        gr.mount_gradio_app(
            app,
            blocks,
            PATH,
            footer_links=[],
            app_kwargs={"middleware": [Middleware(Door, uploads=uploads)]},
            ssr_mode=False,
            show_error=True,
            max_file_size=largest,
            theme=gr.themes.Default(primary_hue="indigo", font=_FONTS, font_mono=("ui-monospace", "monospace")),
            css=STYLE.read_text(encoding="utf-8"),
        )
        _keep_small(app, blocks, uploads, folder)

        @app.get("/", include_in_schema=False)
        async def root() -> RedirectResponse:
            return RedirectResponse(f".{PATH}/")

        @app.get("/favicon.ico", include_in_schema=False)
        async def icon() -> Response:
            return Response(ICON, media_type="image/svg+xml")

    asyncio.run(mounted())


def _fetch_nothing(blocks: gr.Blocks, uploads: Uploads) -> None:
    """Mounted into an application, Gradio lets any component be sent any path or address, and copies what is there.

    It asks here only for files of one shape; `Uploads.read` is what keeps all other paths out.
    """

    async def uploaded(path: str | Path | None) -> str | None:
        try:
            return None if path is None else str(uploads.folder.joinpath(*uploads.names(str(path))))
        except RefusalError as refusal:
            raise gr.Error(refusal_sentence(refusal), print_exception=False) from refusal

    for component in blocks.blocks.values():
        vars(component)["async_move_resource_to_block_cache"] = uploaded


def _log_one_line(blocks: gr.Blocks) -> None:
    """Gradio prints a traceback for each request that the page's own scripts would not have sent."""
    process = blocks.process_api

    async def process_api(*args: Any, **kwargs: Any) -> Any:
        try:
            return await process(*args, **kwargs)
        except gr.Error as error:
            error.print_exception = False
            raise
        except Exception as error:
            log.warning("a request to the page was refused: %s", one_line(error))
            raise gr.Error(REFUSED, print_exception=False) from error

    vars(blocks)["process_api"] = process_api


def _keep_small(app: FastAPI, blocks: gr.Blocks, uploads: Uploads, folder: HeldFolder) -> None:
    """Deletes old uploads while the application runs, and all at its end."""
    inner = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        sweeping = asyncio.ensure_future(uploads.keep_sweeping())
        try:
            async with inner(app) as state:
                yield state
        finally:
            sweeping.cancel()
            await asyncio.wait((sweeping,))
            folder.remove()

    app.router.lifespan_context = lifespan
    # Gradio remembers the name of each upload, for a sweep of its own that leaves the folders behind.
    vars(blocks)["upload_file_set"] = _Forgetful()


class _Forgetful(set[str]):
    def update(self, *names: object) -> None:
        pass


def _blocks(answers: Answers) -> gr.Blocks:
    service = answers.service
    has_index = service.index is not None
    blocks = gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True)
    with blocks:
        gr.Markdown(f"# {TITLE}")
        with gr.Tabs(selected="text" if has_index else "labels"):
            with gr.Tab("以文搜图 / search by text", id="text"):
                _text_tab(answers) if has_index else gr.Markdown(NO_INDEX)
            with gr.Tab("以图搜图 / search by picture"):
                _picture_tab(answers) if has_index else gr.Markdown(NO_INDEX)
            with gr.Tab("零样本分类 / zero-shot labels", id="labels"):
                _labels_tab(answers)
            with gr.Tab("模型信息 / model", elem_id="facts") as tab:
                table = gr.HTML()
                _when([tab.select], answers, answers.facts, [], table)
    blocks.queue(api_open=False, max_size=service.limits.max_queue, default_concurrency_limit=service.limits.max_batch)
    return blocks


def _text_tab(answers: Answers) -> None:
    with gr.Row(equal_height=True):
        text = gr.Textbox(
            label="想找什么 / what to look for", placeholder=PHRASES[0], scale=8, elem_id="phrase", autofocus=True
        )
        button = gr.Button("搜索 / search", variant="primary", scale=1, min_width=120)
    with gr.Row():
        examples = [gr.Button(phrase, size="sm", min_width=80) for phrase in PHRASES]
    with gr.Row():
        k = _k_slider()
        min_score = gr.Slider(-1, 1, -1, step=0.01, label="最低分 / minimum score")
    hits = gr.HTML(elem_id="text-hits")
    _when([button.click, text.submit], answers, answers.by_text, [text, k, min_score], hits)
    for phrase, example in zip(PHRASES, examples, strict=True):
        chosen = example.click(None, None, text, js=f"() => {json.dumps(phrase)}")
        _when([chosen.then], answers, answers.by_text, [text, k, min_score], hits)


def _picture_tab(answers: Answers) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            picture = _picture("query-picture")
            text = gr.Textbox(label="再加一句话（可不填）/ and a phrase", placeholder="黑色的 / black")
            share = gr.Slider(0, 1, 0.5, step=0.05, label="这句话的权重 / its weight")
            k = _k_slider()
            button = gr.Button("搜索 / search", variant="primary")
        with gr.Column(scale=2, min_width=320):
            hits = gr.HTML(elem_id="picture-hits")
    asking = [picture.upload, button.click, text.submit]
    _when(asking, answers, answers.by_picture, [picture, text, share, k], hits)
    picture.clear(None, None, hits, js="() => null")


def _labels_tab(answers: Answers) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            picture = _picture("labelled-picture")
            labels = gr.Textbox(
                "\n".join(LABELS),
                label="标签，一行一个 / labels, one a line",
                lines=6,
                max_lines=8,
                elem_id="labels",
            )
            templates = gr.Textbox(
                "\n".join(TEMPLATES),
                label="模板，{} 处填标签 / templates, with {} for the label",
                lines=2,
                max_lines=6,
                elem_id="templates",
            )
            button = gr.Button("分类 / classify", variant="primary")
        with gr.Column(scale=1, min_width=320):
            shares = gr.Label(label="概率 / probabilities", num_top_classes=MOST_LABELS_SHOWN, elem_id="shares")
            gr.Markdown(SOFTMAX)
    _when([picture.upload, button.click], answers, answers.labels, [picture, labels, templates], shares)
    picture.clear(None, None, shares, js="() => null")


def _picture(elem_id: str) -> gr.Image:
    """A field to drop a picture in. Gives the path of the upload as the request has it, which may be any."""
    picture = gr.Image(sources=["upload", "clipboard"], label="图片 / picture", height=240, buttons=[], elem_id=elem_id)
    # Gradio's own would decode the picture, of whatever size.
    vars(picture)["preprocess"] = lambda upload: upload and upload.path
    return picture


def _k_slider() -> gr.Slider:
    return gr.Slider(1, MOST_SHOWN, 12, step=1, label="最多几张 / at most")


def _when(
    events: Sequence[Callable[..., Any]],
    answers: Answers,
    function: Callable[..., Awaitable[object]],
    inputs: Sequence[Any],
    output: Any,
) -> None:
    """Shows what `function` gives, within the time a request has, or a sentence about why there is nothing."""
    timeout = answers.service.limits.timeout

    async def answer(*given: Any) -> object:
        try:
            return await asyncio.wait_for(function(*given), timeout)
        except asyncio.TimeoutError:
            _note(TIMEOUT)
        except RefusalError as refusal:
            _note(refusal_sentence(refusal))
        except ValidationError as error:
            _note(fault_sentence(error))
        except Exception:
            log.exception("the page could not answer")
            _note(FAILED)
        return None

    for event in events:
        event(answer, list(inputs), output, api_visibility="private", show_progress="minimal")


def _note(sentence: str) -> None:
    gr.Warning(html.escape(sentence))


def refusal_sentence(refusal: RefusalError) -> str:
    """What people are told: Chinese first, and what the service itself says."""
    if refusal.code is None:
        return refusal.message
    return f"{REFUSALS.get(refusal.code, REFUSED)} / {refusal.message}"


def fault_sentence(error: ValidationError) -> str:
    """What people are told of the first field that is not as it should be."""
    first = error.errors()[0]
    field = "query" if "text" in first["loc"] else str(first["loc"][0])
    return FAULTS.get(field, f"{REFUSED} / {field}: {first['msg']}")


def _lines(text: str) -> list[str]:
    return list(dict.fromkeys(line.strip() for line in text.split("\n") if line.strip()))
