"""Draws docs/images/report.png: three parts of a report beside each other, in Chromium.

cn-clip demo --output demo-output && cn-clip report demo-output/experiments/emoji-tiny_seed123_steps100 \\
    --data demo-output/datasets/emoji/lmdb/valid --zeroshot demo-output/datasets/emoji-classes/test \\
    --labels demo-output/datasets/emoji-classes/label_cn.txt --dataset emoji --output report.html
python tools/draw_report_picture.py report.html

Needs the extra `browser`, and Chromium (CHROMIUM=path). The figures on the picture are those of that run.
"""

import os
import shutil
import sys
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "images" / "report.png"
WIDTH, HEIGHT, GAP = 580, 720, 2
ENLARGED = 1.5  # the page is that much larger, so that more of it is seen
# What stands at the top of each column: nothing, or a heading that holds these words.
COLUMNS = (None, "条最差的查询", "混淆矩阵")


def main() -> None:
    report = Path(sys.argv[1]).resolve()
    drawn = Image.new("RGB", (len(COLUMNS) * (WIDTH + GAP) - GAP, HEIGHT), "#dddddd")
    with sync_playwright() as playwright:
        program = os.environ.get("CHROMIUM") or shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(
            viewport={"width": int(WIDTH * ENLARGED), "height": int(HEIGHT * ENLARGED)}, color_scheme="light"
        )
        page.goto(report.as_uri())
        for number, words in enumerate(COLUMNS):
            if words is not None:
                heading = page.locator("h2, h3", has_text=words).first
                heading.evaluate("one => scrollTo(0, one.getBoundingClientRect().top + scrollY - 12)")
            with Image.open(BytesIO(page.screenshot())) as column:
                drawn.paste(
                    column.convert("RGB").resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS), (number * (WIDTH + GAP), 0)
                )
        browser.close()
    drawn.quantize(256).save(OUTPUT, optimize=True)
    print(OUTPUT)


if __name__ == "__main__":
    main()
