"""`examples/browser`: pictures found by text in Chromium, without a server that computes."""

import functools
import os
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from documents import ROOT
from test_page_browser import CHROMIUM, FLAGS

from cn_clip import Encoder, emoji_pack
from cn_clip.clip.pictures import open_picture

MODULES = Path(os.environ.get("TRANSFORMERS_JS", ROOT / ".venv/transformers-js"), "node_modules")


class Silent(SimpleHTTPRequestHandler):
    """Files, without a line for each."""

    def log_message(self, *args: object) -> None:
        pass


@pytest.mark.browser
def test_the_page_finds_what_the_encoder_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from playwright.sync_api import sync_playwright

    monkeypatch.syspath_prepend(str(ROOT / "examples" / "browser"))
    sys.modules.pop("make", None)
    import make

    make.make(tmp_path / "site", "Emoji-Tiny", MODULES)
    encoder, items = Encoder("Emoji-Tiny", device="cpu"), emoji_pack.load()[::40]
    scores = encoder.encode_images([open_picture(one.picture, name=one.name) for one in items])
    cosines = (scores @ encoder.encode_texts(["一只猫"])[0]).tolist()
    best = sorted(zip(cosines, [f"{one.name}.png" for one in items], strict=True), reverse=True)[:5]
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=str(tmp_path / "site"))) as server,
        sync_playwright() as playwright,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        page = browser.new_page(locale="zh-CN")
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        page.wait_for_selector("body[data-ready=yes]", timeout=120_000)
        found = page.locator("figcaption").all_inner_texts()[:5]
        browser.close()
        server.shutdown()
    assert all(one.startswith(("http://127.0.0.1:", "data:", "blob:")) for one in asked)
    for caption, (cosine, name) in zip(found, best, strict=True):
        score, _, shown = caption.partition(" ")
        assert shown == name
        assert float(score) == pytest.approx(cosine, abs=0.002)
