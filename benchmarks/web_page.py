"""How soon the web page shows its first picture: `python benchmarks/web_page.py photos.index`, with Chromium.

Starts the service on the index, and searches in a new page for each phrase. Prints milliseconds from the last byte of
the answer of /v1/search to the first picture on the screen, for a desktop and a phone, and the whole way from Enter.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys

from playwright.sync_api import Browser, sync_playwright

PHRASES = ("海边的日落", "一只狗", "小孩", "红色的车", "雪山", "生日蛋糕", "夜晚的城市", "骑自行车的人", "花", "猫")
SIZES = {"desktop 1440x900": (1440, 900, 1), "phone 390x844": (390, 844, 3)}
# The first picture of an answer is on the screen in the frame after the one in which it was loaded.
WATCH = """
document.addEventListener("load", (event) => {
    if (!event.target.matches?.("#grid img") || window.shownAt || !window.askedAt) return;
    requestAnimationFrame(() => requestAnimationFrame(() => (window.shownAt ??= performance.now())));
}, true);
addEventListener("keydown", (event) => { if (event.key === "Enter") window.askedAt = performance.now(); }, true);
"""
ANSWERED = """() => Math.max(...performance.getEntriesByType("resource")
    .filter((one) => one.name.endsWith("/v1/search")).map((one) => one.responseEnd))"""


def measured(browser: Browser, address: str, phrase: str, size: tuple[int, int, int]) -> tuple[float, float]:
    """(ms from the answer, ms from Enter) to the first picture."""
    width, height, scale = size
    context = browser.new_context(viewport={"width": width, "height": height}, device_scale_factor=scale)
    page = context.new_page()
    page.add_init_script(WATCH)
    page.goto(address)
    page.wait_for_function("() => document.querySelector('#grid').children.length")
    page.wait_for_load_state("networkidle")
    page.locator("#query").fill(phrase)
    page.locator("#query").press("Enter")
    page.wait_for_function("() => window.shownAt")
    shown, asked = page.evaluate("[window.shownAt, window.askedAt]")
    answered = page.evaluate(ANSWERED)
    context.close()
    return shown - answered, shown - asked


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("index")
    command = [sys.executable, "-m", "cn_clip", "serve", parser.parse_args().index, "--port", "0", "--originals"]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8") as server,
        sync_playwright() as playwright,
    ):
        assert server.stdout is not None
        address = ""
        for line in server.stdout:
            if "web page: " in line:
                address = line.rpartition("web page: ")[2].strip()
            if " ready: " in line:
                break
        try:
            chromium = shutil.which(os.environ.get("CHROMIUM", "chromium"))
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            for name, size in SIZES.items():
                measured(browser, address, "warm", size)
                answers, enters = zip(*(measured(browser, address, one, size) for one in PHRASES), strict=True)
                print(
                    f"{name}: first picture {statistics.median(answers):.0f} ms after the answer (at most "
                    f"{max(answers):.0f}), {statistics.median(enters):.0f} ms after Enter (at most {max(enters):.0f}); "
                    f"{len(PHRASES)} phrases",
                    flush=True,
                )
            browser.close()
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
