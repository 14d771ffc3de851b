"""The web page as people use it, in Chromium: `make test-browser`.

AXE names the script of axe-core, which the make target fetches.
"""

import base64
import os
import shutil
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote, urlsplit

import httpx
import pytest
from PIL import Image
from serving import data_url, served

from cn_clip.clip.encoder import Encoder
from cn_clip.emoji_pack import load
from cn_clip.index import build
from cn_clip.retrieval.manifest import Manifest, ModelInfo
from cn_clip.retrieval.store import open_index
from cn_clip.retrieval.writer import NewItem, open_writer

api = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.browser

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which(os.environ.get("CHROMIUM", "chromium"))
AXE = Path(os.environ.get("AXE", ROOT / ".venv/node_modules/axe-core/axe.min.js"))
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
EMOJI = load("twemoji")[::12]
CAKE = next(one for one in load("twemoji") if one.name == "生日蛋糕")
SCRIPT = "<img src=x onerror=alert(1)>"
KEY = "correct horse battery staple"
# What PIL does to make the stored picture of each EXIF orientation out of the upright one.
STORED = {
    1: (),
    2: (Image.Transpose.FLIP_LEFT_RIGHT,),
    3: (Image.Transpose.ROTATE_180,),
    4: (Image.Transpose.FLIP_TOP_BOTTOM,),
    5: (Image.Transpose.TRANSPOSE,),
    6: (Image.Transpose.ROTATE_90,),
    7: (Image.Transpose.TRANSVERSE,),
    8: (Image.Transpose.ROTATE_270,),
}


def on_white(picture: bytes, side: int, height: int | None = None) -> Image.Image:
    with Image.open(BytesIO(picture)) as image:
        rgba = image.convert("RGBA").resize((side, height or side))
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def jpeg(image: Image.Image, orientation: int = 1) -> bytes:
    """As a camera held so writes it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x0110] = SCRIPT
    exif.get_ifd(0x8769)[0x9003] = "2021:05:03 14:22:10"
    for step in STORED[orientation]:
        image = image.transpose(step)
    stream = BytesIO()
    image.save(stream, "JPEG", quality=95, exif=exif)
    return stream.getvalue()


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder("Emoji-Tiny", device="cpu", upright=True)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of several shapes in folders, whose names are scripts and others."""
    root = tmp_path_factory.mktemp("page")
    for number, one in enumerate([CAKE, *EMOJI]):
        folder = root / "pictures" / ("旅行", SCRIPT.replace("/", ""), "家人/孩子")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        shape = ((200, 200), (240, 160), (160, 240))[number % 3]
        (folder / f"{one.name.replace('/', ' ')}.jpg").write_bytes(jpeg(on_white(one.picture, *shape)))
    target = root / "photos.index"
    build.main([str(root / "pictures"), "--output", str(target), "--model", "Emoji-Tiny", "--device", "cpu"])
    return target


@pytest.fixture(scope="module")
def address(encoder: Encoder, index: Path) -> Iterator[str]:
    with served(encoder, index=open_index(index), with_page=True, with_originals=True) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator["api.Browser"]:
    if CHROMIUM is None:
        pytest.fail("Chromium is needed: apt-get install chromium, or CHROMIUM=path")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


class Visit:
    """A page and what is wrong with it: hosts that it asked, complaints of the browser, dialogs of scripts."""

    def __init__(self, browser: "api.Browser", **given: object) -> None:
        settings = {"locale": "zh-CN", "viewport": {"width": 1100, "height": 760}, **given}
        self.context = browser.new_context(**settings)  # type: ignore[arg-type]
        self.page = self.context.new_page()
        self.hosts: set[str | None] = set()
        self.wrong: list[str] = []
        self.page.on("request", lambda one: self.hosts.add(urlsplit(one.url).hostname))
        self.page.on("console", lambda one: self.wrong.append(one.text) if one.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("dialog", lambda dialog: self.wrong.append(dialog.message))

    def __enter__(self) -> "api.Page":
        return self.page

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.context.close()
        if kind is None:
            assert self.hosts - {None} == {"127.0.0.1"}
            assert self.wrong == []


@pytest.fixture
def page(address: str, browser: "api.Browser") -> Iterator["api.Page"]:
    with Visit(browser) as page:
        page.goto(address)
        names(page)
        yield page


def names(page: "api.Page") -> list[str]:
    """What the pictures of the first screen are called, once an answer is there and they are."""
    page.wait_for_function(
        "() => !document.querySelector('#grid').ariaBusy && document.querySelector('#grid').children.length && "
        "[...document.querySelectorAll('#grid img')].slice(0, 8).every(one => one.complete && one.naturalWidth)"
    )
    found: list[str] = page.locator("#grid img").evaluate_all("all => all.map(one => one.alt)")
    return found


def search(page: "api.Page", phrase: str) -> list[str]:
    page.keyboard.press("/")
    with page.expect_response("**/v1/search"):
        page.keyboard.type(phrase)
        page.keyboard.press("Enter")
    return names(page)


def shoot(page: "api.Page", name: str) -> None:
    """Keeps a picture of the page in the folder SCREENSHOTS names."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.wait_for_timeout(500)
        page.screenshot(path=Path(folder) / f"{name}.png")


def give(page: "api.Page", data: bytes, name: str = "picture.jpg") -> list[str]:
    """The pictures that the page finds for one that is chosen."""
    with page.expect_response("**/v1/search"):
        page.locator("#file").set_input_files({"name": name, "mimeType": "image/jpeg", "buffer": data})
    return names(page)


def test_the_page_opens_with_the_pictures_how_many_there_are_and_more_as_one_scrolls(page: "api.Page") -> None:
    api.expect(page.locator("#status")).to_have_text(f"{len(EMOJI) + 1} 张图片")
    shoot(page, "home")
    page.mouse.move(500, 500)
    for _ in range(40):
        page.mouse.wheel(0, 3000)
        page.wait_for_timeout(50)
    api.expect(page.locator("#grid li")).to_have_count(len(EMOJI) + 1)
    assert len(set(names(page))) >= len(EMOJI)


def test_rows_of_pictures_have_one_height_and_fill_the_width(page: "api.Page") -> None:
    boxes = page.locator("#grid li").evaluate_all(
        "all => all.map(one => one.getBoundingClientRect()).map(({top, right, height}) => ({top, right, height}))"
    )
    width = page.evaluate("document.querySelector('#grid').getBoundingClientRect().right")
    rows: dict[float, list[dict[str, float]]] = {}
    for box in boxes:
        rows.setdefault(round(box["top"]), []).append(box)
    assert len(rows) > 3
    for row in list(rows.values())[:-1]:  # the last goes on with the next pictures
        assert max(box["height"] for box in row) - min(box["height"] for box in row) < 8
        assert row[-1]["right"] == pytest.approx(width, abs=1)


def test_the_keyboard_alone_leads_from_a_search_to_the_original_and_back(page: "api.Page") -> None:
    found = search(page, CAKE.name)
    assert found[0] == f"{CAKE.name}.jpg"
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.querySelector('img').alt") == found[0]
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    original = page.locator("#viewer .stage img.full")
    api.expect(original).to_be_visible()
    assert "/v1/index/items/" in str(original.get_attribute("src"))
    assert "旅行" in unquote(page.url)
    shoot(page, "viewer")
    page.keyboard.press("ArrowRight")
    api.expect(page.locator("#viewer h2")).to_have_text(found[1])
    page.keyboard.press("Escape")
    api.expect(page.locator("#viewer")).to_be_hidden()
    assert page.evaluate("document.activeElement.querySelector('img').alt") == found[1]
    assert "open=" not in page.url


def test_up_and_down_move_to_the_row_beside_and_end_to_the_last(page: "api.Page") -> None:
    page.keyboard.press("/")
    page.keyboard.press("ArrowDown")
    top = "document.activeElement.getBoundingClientRect().top + scrollY"
    left = "document.activeElement.getBoundingClientRect().left"
    first = page.evaluate(top)
    page.keyboard.press("ArrowDown")
    assert page.evaluate(top) > first
    assert page.evaluate(left) < 300
    page.keyboard.press("ArrowUp")
    assert page.evaluate(top) == pytest.approx(first, abs=1)
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.closest('li').nextSibling") is None


def test_the_back_button_undoes_a_search_and_the_address_brings_it_back(page: "api.Page", address: str) -> None:
    before = names(page)
    found = search(page, CAKE.name)
    there = page.url
    page.go_back()
    api.expect(page.locator("#status")).to_have_text(f"{len(EMOJI) + 1} 张图片")
    assert names(page)[:5] == before[:5]
    page.goto("about:blank")
    page.goto(there)
    assert names(page)[:5] == found[:5]
    assert page.locator("#query").input_value() == CAKE.name


@pytest.mark.parametrize("side", [96, 2400], ids=["as it is", "made smaller"])
def test_a_picture_of_every_orientation_finds_the_same_as_upright_over_http(
    page: "api.Page", address: str, side: int
) -> None:
    upright = on_white(CAKE.picture, side, side * 2 // 3)
    answer = httpx.post(
        f"{address}/v1/search", json={"query": {"image": data_url(jpeg(upright), "jpeg")}, "k": 3}, timeout=60
    )
    expected = [hit["metadata"]["file"] for hit in answer.json()["data"]]
    assert {orientation: give(page, jpeg(upright, orientation))[:3] for orientation in STORED} == dict.fromkeys(
        STORED, expected
    )


def test_a_large_picture_is_made_smaller_before_it_is_sent(page: "api.Page") -> None:
    with page.expect_request("**/v1/search") as sent:
        page.locator("#file").set_input_files(
            {"name": "a.jpg", "mimeType": "image/jpeg", "buffer": jpeg(on_white(CAKE.picture, 3000))}
        )
    (part,) = sent.value.post_data_json["query"]
    with Image.open(BytesIO(base64.b64decode(part["image"].partition(",")[2]))) as image:
        assert (image.size, image.format) == ((1024, 1024), "JPEG")


def test_a_pasted_and_a_dropped_picture_are_looked_for(page: "api.Page") -> None:
    script = """([kind, type, data]) => {
        const transfer = new DataTransfer();
        const bytes = Uint8Array.from(atob(data), one => one.charCodeAt(0));
        transfer.items.add(new File([bytes], "a.jpg", {type: "image/jpeg"}));
        const init = {bubbles: true, cancelable: true, [kind]: transfer};
        const kindOfEvent = kind === "dataTransfer" ? DragEvent : ClipboardEvent;
        document.body.dispatchEvent(new kindOfEvent(type, init));
    }"""
    data = data_url(jpeg(on_white(CAKE.picture, 64))).partition(",")[2]
    for kind, type_ in (("clipboardData", "paste"), ("dataTransfer", "drop")):
        page.goto(page.url.partition("#")[0] + "#")
        with page.expect_response("**/v1/search"):
            page.evaluate(script, [kind, type_, data])
        assert names(page)[0] == f"{CAKE.name}.jpg"
        api.expect(page.locator("#parts")).to_contain_text("你的图片")


def test_a_picture_a_phrase_and_what_is_not_wanted_are_asked_together(page: "api.Page") -> None:
    give(page, jpeg(on_white(CAKE.picture, 96)))
    page.get_by_role("button", name="不要…").click()
    with page.expect_request("**/v1/search"):
        page.keyboard.type("蛋糕")
        page.keyboard.press("Enter")
    names(page)
    with page.expect_request("**/v1/search") as sent:
        page.locator("#query").fill("红色")
        page.locator("#query").press("Enter")
    parts = sent.value.post_data_json["query"]
    assert parts[0] == {"text": "红色"}
    assert parts[1]["image"].startswith("data:image/jpeg;base64,")
    assert parts[2] == {"text": "蛋糕", "weight": -0.5}
    names(page)
    shoot(page, "mixed")
    page.get_by_role("button", name="去掉：你的图片").click()
    api.expect(page.locator("#parts li")).to_have_count(1)


def test_more_like_this_and_not_this_ask_by_the_item(page: "api.Page") -> None:
    search(page, CAKE.name)
    for button, part in (("找相似的", {"id": f"旅行/{CAKE.name}.jpg"}), ("不要这样的", None)):
        page.locator("#grid a").first.click()
        with page.expect_request("**/v1/search") as sent:
            page.get_by_role("button", name=button).click()
        asked = sent.value.post_data_json["query"]
        assert part is None or asked == [part]
        names(page)
    assert asked == [{"id": f"旅行/{CAKE.name}.jpg"}, {"id": f"旅行/{CAKE.name}.jpg", "weight": -0.5}] or (
        asked[-1]["weight"] == -0.5
    )


def test_filters_are_chips_that_make_one_condition(page: "api.Page") -> None:
    page.get_by_role("button", name="日期", exact=True).click()
    with page.expect_request("**/v1/index/items?*") as sent:
        page.get_by_role("button", name="2021", exact=True).click()
    assert 'where=date>="2021-01-01" date<"2022-01-01"' in unquote(sent.value.url.replace("+", " "))
    names(page)
    page.get_by_role("button", name="文件夹", exact=True).click()
    with page.expect_request("**/v1/index/items?*") as sent:
        page.keyboard.type("家人")
        page.keyboard.press("Enter")
    assert 'folder~"家人"' in unquote(sent.value.url.replace("+", " "))
    names(page)
    shoot(page, "filters")
    api.expect(page.locator("#filters")).to_contain_text("日期：2021")
    page.get_by_role("button", name="全部清除").click()
    api.expect(page.locator("#status")).to_have_text(f"{len(EMOJI) + 1} 张图片")


def test_names_that_are_scripts_are_shown_as_they_are(page: "api.Page") -> None:
    page.goto(page.url.partition("#")[0] + f"#q={CAKE.name}")
    names(page)
    page.locator("#grid a").first.click()
    facts = page.locator("#viewer .facts")
    api.expect(facts).to_contain_text(SCRIPT)
    assert page.locator("img[src='x']").count() == 0
    shoot(page, "script")


def test_an_error_is_told_in_the_language_of_the_reader_with_the_limit(
    encoder: Encoder, index: Path, browser: "api.Browser"
) -> None:
    from cn_clip.serve.limits import Limits

    with served(encoder, Limits(max_pixels=4000), index=open_index(index), with_page=True) as address:
        visit = Visit(browser)
        with visit as page:
            page.goto(address)
            names(page)
            large = jpeg(on_white(CAKE.picture, 100))
            page.locator("#file").set_input_files({"name": "a.jpg", "mimeType": "image/jpeg", "buffer": large})
            trouble = page.locator("#trouble")
            api.expect(trouble).to_have_text("图片的像素太多，上限是 4,000")
            page.locator("#language").click()
            page.goto(f"{address}/#where=%3D")
            api.expect(trouble).to_contain_text("The condition is wrong")
            visit.wrong.clear()  # the browser complains of the answers 400


def test_labels_and_templates_can_be_edited_and_an_item_be_labelled(page: "api.Page") -> None:
    search(page, CAKE.name)
    page.locator("#grid a").first.click()
    page.get_by_role("button", name="试试标签").click()
    first = page.locator(".bars li").first
    api.expect(first).to_contain_text("蛋糕")
    page.get_by_label("标签，一行一个").fill("一把雨伞\n生日蛋糕\n一只老虎")
    page.get_by_role("button", name="分类").click()
    api.expect(first).to_contain_text("生日蛋糕")
    shoot(page, "labels")
    page.get_by_label("模板").fill("{}")
    with page.expect_request("**/v1/classify") as sent:
        page.get_by_role("button", name="分类").click()
    assert sent.value.post_data_json["templates"] == ["{}"]
    page.locator("#labels input[type=file]").set_input_files(
        {"name": "a.png", "mimeType": "image/jpeg", "buffer": jpeg(on_white(CAKE.picture, 64))}
    )
    api.expect(page.get_by_role("button", name="换一张")).to_be_visible()
    api.expect(first).to_contain_text("生日蛋糕")


def test_a_video_is_shown_at_its_second(encoder: Encoder, browser: "api.Browser", tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "clip.webm"), "w") as film:
        stream = film.add_stream("libvpx", rate=10)
        stream.width = stream.height = 64
        for number in range(60):
            picture = Image.new("RGB", (64, 64), (number * 4, 0, 0))
            film.mux(stream.encode(av.VideoFrame.from_image(picture)))
        film.mux(stream.encode())
    known = {"source": str(tmp_path), "path": str(tmp_path / "clip.webm"), "file": "clip.webm", "kind": "video"}
    item = NewItem(
        "clip.webm#t=2.5", encoder.encode_texts(["x"])[0], {**known, "time": 2.5}, jpeg(Image.new("RGB", (64, 64)))
    )
    with open_writer(tmp_path / "index", Manifest(ModelInfo("tiny", "fingerprint", encoder.embed_dim))) as writer:
        writer.commit([item])
    opened = open_index(tmp_path / "index")
    with served(encoder, index=opened, with_page=True, with_originals=True) as address, Visit(browser) as page:
        page.goto(address)
        api.expect(page.locator(".tile .time")).to_have_text("0:02")
        page.locator("#grid a").click()
        page.wait_for_function("() => document.querySelector('#viewer video')?.readyState >= 2")
        assert page.evaluate("document.querySelector('#viewer video').currentTime") == pytest.approx(2.5, abs=0.2)


def test_a_picture_that_browsers_do_not_show_is_asked_for_once_as_a_jpeg(
    encoder: Encoder, browser: "api.Browser", tmp_path: Path
) -> None:
    Image.new("RGB", (640, 480), "navy").save(tmp_path / "scan.tif")
    known = {"source": str(tmp_path), "path": str(tmp_path / "scan.tif"), "file": "scan.tif"}
    item = NewItem("scan.tif", encoder.encode_texts(["x"])[0], known, jpeg(Image.new("RGB", (64, 48))))
    with open_writer(tmp_path / "index", Manifest(ModelInfo("tiny", "fingerprint", encoder.embed_dim))) as writer:
        writer.commit([item])
    opened = open_index(tmp_path / "index")
    with served(encoder, index=opened, with_page=True, with_originals=True) as address, Visit(browser) as page:
        asked: list[str] = []
        page.on("request", lambda one: asked.append(urlsplit(one.url).path + "?" + urlsplit(one.url).query))
        page.goto(address)
        page.locator("#grid a").click()
        shown = page.locator("#viewer .stage img.full")
        api.expect(shown).to_be_visible()
        assert shown.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [640, 480]
    assert [one for one in asked if "/items/" in one] == ["/v1/index/items/scan.tif?as=jpeg"]


def test_behind_a_sub_path_everything_is_found(address: str, browser: "api.Browser") -> None:
    """As behind a reverse proxy that takes the sub path away."""
    with Visit(browser) as page:
        page.route("**/photos/**", lambda route: route.continue_(url=route.request.url.replace("/photos/", "/", 1)))
        paths: list[str] = []
        page.on("request", lambda one: paths.append(urlsplit(one.url).path))
        page.goto(f"{address}/photos/")
        assert search(page, CAKE.name)[0] == f"{CAKE.name}.jpg"
        page.locator("#grid a").first.click()
        api.expect(page.locator("#viewer img.full")).to_be_visible()
    assert [path for path in paths if not path.startswith("/photos/")] == []


def test_without_originals_the_small_picture_is_shown_and_told_so(
    encoder: Encoder, index: Path, browser: "api.Browser"
) -> None:
    with served(encoder, index=open_index(index), with_page=True) as address, Visit(browser) as page:
        page.goto(f"{address}/#q={CAKE.name}")
        names(page)
        page.locator("#grid a").first.click()
        api.expect(page.locator("#viewer .note")).to_have_text("服务没有提供原文件，这里是索引里的小图")


def test_without_an_index_it_says_how_to_make_one_and_labels_all_the_same(
    encoder: Encoder, browser: "api.Browser"
) -> None:
    with served(encoder, with_page=True) as address, Visit(browser, locale="en-US") as page:
        page.goto(address)
        api.expect(page.locator("#pictures")).to_contain_text("cn-clip index build")
        page.get_by_role("link", name="Labels").click()
        api.expect(page.get_by_role("button", name="Classify")).to_be_visible()


def test_the_key_is_asked_for_once_and_pictures_load_by_the_session(
    encoder: Encoder, index: Path, browser: "api.Browser"
) -> None:
    opened = open_index(index)
    with served(encoder, api_key=KEY, index=opened, with_page=True) as address:
        visit = Visit(browser)
        with visit as page:
            page.goto(address)
            api.expect(page.locator("#key")).to_be_visible()
            page.keyboard.type("wrong")
            page.keyboard.press("Enter")
            api.expect(page.locator("#key-trouble")).to_have_text("密钥不对")
            page.keyboard.type(KEY)
            page.keyboard.press("Enter")
            api.expect(page.locator("#key")).to_be_hidden()
            assert names(page)
            visit.wrong.clear()  # the browser complains of the answers 401
            page.reload()
            assert names(page)
            assert page.locator("#key").is_hidden()


AUDIT = "async () => (await axe.run()).violations.flatMap(one => one.nodes.map(node => `${one.id}: ${node.html}`))"


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("locale", ["zh-CN", "en-US"])
def test_axe_core_finds_nothing_in_any_view_theme_and_language(
    address: str, browser: "api.Browser", width: int, theme: str, locale: str
) -> None:
    if not AXE.exists():
        pytest.fail(f"{AXE} is not there: npm install --no-save --prefix .venv axe-core, or AXE=path of axe.min.js")
    given = {"viewport": {"width": width, "height": 800}, "color_scheme": theme, "locale": locale}
    with Visit(browser, reduced_motion="reduce", **given) as page:
        found: dict[str, list[str]] = {}

        def audit(name: str) -> None:
            shoot(page, f"{name}-{width}-{theme}-{locale[:2]}")
            page.evaluate(AXE.read_text(encoding="utf-8"))
            found[name] = page.evaluate(AUDIT)

        page.goto(address)
        names(page)
        audit("home")
        page.goto(f"{address}/#q={CAKE.name}&not=x&since=2021-01-01&folder=旅行")
        names(page)
        page.locator('[data-key="date"]').click()
        audit("search")
        page.locator("#grid a").first.click()
        api.expect(page.locator("#viewer img.full")).to_be_visible()
        audit("viewer")
        page.locator('[data-key="labels"]').click()
        api.expect(page.locator(".bars li").first).to_be_visible()
        audit("labels")
        page.goto(f"{address}/#view=about")
        api.expect(page.locator(".about").first).to_be_visible()
        audit("about")
        page.goto(f"{address}/#q={CAKE.name}&folder=nowhere")
        api.expect(page.locator("#grid li")).to_have_count(0)
        audit("nothing")
        assert {name: faults for name, faults in found.items() if faults} == {}
