"""The web page as people use it, in Chromium: `make test-browser`."""

import os
import re
import shutil
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image
from serving import served

from cn_clip.clip.encoder import Encoder
from cn_clip.demo.emoji import png
from cn_clip.emoji_pack import load
from cn_clip.retrieval.manifest import Manifest, ModelInfo
from cn_clip.retrieval.store import open_index
from cn_clip.retrieval.writer import NewItem, open_writer

pytest.importorskip("gradio")
from cn_clip.serve import page as texts

api = pytest.importorskip("playwright.sync_api")
pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

CHROMIUM = shutil.which(os.environ.get("CHROMIUM", "chromium"))
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
NAMES = ("猫脸", "生日蛋糕", "红苹果", "下雨")
EMOJI = [one for place, one in enumerate(load("twemoji")) if place % 16 == 0 or one.name in NAMES]
CAT = next(one for one in EMOJI if one.name == "猫脸")
# Gradio's own remarks, of no kind that a user could see.
HARMLESS = re.compile("Autofocus processing was blocked|Method not implemented")


def jpeg(picture: bytes) -> bytes:
    stream = BytesIO()
    with Image.open(BytesIO(picture)) as image:
        rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    Image.alpha_composite(white, rgba).convert("RGB").save(stream, "JPEG", quality=90)
    return stream.getvalue()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    encoder = Encoder("Emoji-Tiny", device="cpu")
    rows = encoder.encode_images([one.picture for one in EMOJI])
    folder = tmp_path_factory.mktemp("index") / "emoji.index"
    items = [
        NewItem(one.number, row, {"caption": one.name}, jpeg(one.picture)) for one, row in zip(EMOJI, rows, strict=True)
    ]
    with open_writer(folder, Manifest(ModelInfo("tiny", "fingerprint", encoder.embed_dim))) as writer:
        writer.commit(items)
    with served(encoder, index=open_index(folder), with_page=True) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator["api.Browser"]:
    if CHROMIUM is None:
        pytest.fail("Chromium is needed: apt-get install chromium, or CHROMIUM=path")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def page(address: str, browser: "api.Browser") -> Iterator["api.Page"]:
    """The open page. At the end: it asked nothing of another host, and the console has no complaint."""
    asked, complaints = set(), []
    with browser.new_context(locale="zh-CN", viewport={"width": 1100, "height": 760}) as context:
        page = context.new_page()
        page.on("request", lambda request: asked.add(urlsplit(request.url).hostname))
        page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(address)
        api.expect(page.locator("h1")).to_have_text(texts.TITLE)
        yield page
    assert asked - {None} == {"127.0.0.1"}
    assert [text for text in complaints if not HARMLESS.search(text)] == []


def shoot(page: "api.Page", name: str) -> None:
    """Keeps a picture of the page in the folder SCREENSHOTS names."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.wait_for_timeout(1000)
        page.screenshot(path=Path(folder) / f"{name}.png")


def open_tab(page: "api.Page", name: str) -> None:
    page.get_by_role("tab", name=name).click()


def drop(page: "api.Page", elem_id: str, data: bytes) -> None:
    picture = {"name": "picture.png", "mimeType": "image/png", "buffer": data}
    page.locator(f"#{elem_id} input[type=file]").set_input_files(picture)


def names(page: "api.Page", elem_id: str) -> list[str]:
    """What the found pictures are called, once they are all there."""
    page.wait_for_function(
        f"() => {{ const all = [...document.querySelectorAll('#{elem_id} img')];"
        " return all.length && all.every(one => one.complete && one.naturalWidth) }"
    )
    return page.locator(f"#{elem_id} .name").all_inner_texts()


def test_a_phrase_finds_the_picture_of_that_name(page: "api.Page") -> None:
    phrase = page.locator("#phrase textarea, #phrase input").first
    phrase.fill("生日蛋糕")
    phrase.press("Enter")
    assert names(page, "text-hits")[0] == "生日蛋糕"
    assert len(names(page, "text-hits")) == 12
    shoot(page, "page-search")


def test_an_example_is_looked_for_when_it_is_clicked(page: "api.Page") -> None:
    page.get_by_role("button", name="小猫").click()
    assert "猫脸" in names(page, "text-hits")[:6]
    api.expect(page.locator("#phrase textarea, #phrase input").first).to_have_value("小猫")


def test_a_dropped_picture_finds_itself_first(page: "api.Page") -> None:
    open_tab(page, "以图搜图")
    drop(page, "query-picture", png(CAT))
    found = names(page, "picture-hits")
    assert found[0] == "猫脸"
    shoot(page, "picture")
    page.get_by_label("再加一句话").fill("红苹果")
    page.get_by_label("再加一句话").press("Enter")
    api.expect(page.locator("#picture-hits .name", has_text="红苹果")).to_be_visible()
    assert names(page, "picture-hits") != found
    shoot(page, "mixed")


def test_a_dropped_picture_is_labelled_and_labels_can_be_edited(page: "api.Page") -> None:
    open_tab(page, "零样本分类")
    drop(page, "labelled-picture", png(CAT))
    top = page.locator("#shares [data-testid=label-output-value]")
    api.expect(top).to_have_text("猫")
    shoot(page, "page-labels")
    page.locator("#labels textarea").fill("老虎的身体\n水果\n带胡须的小猫脸")
    page.get_by_role("button", name="分类").click()
    api.expect(top).to_have_text("带胡须的小猫脸")
    page.locator("#templates textarea").fill("没有空位")
    page.get_by_role("button", name="分类").click()
    api.expect(page.get_by_text(texts.FAULTS["templates"])).to_be_visible()
    shoot(page, "refused")


def test_the_facts_are_shown(page: "api.Page") -> None:
    open_tab(page, "模型信息")
    api.expect(page.locator(".facts")).to_contain_text("64 px")
    api.expect(page.locator(".facts")).to_contain_text(str(len(EMOJI)))
    shoot(page, "facts")
