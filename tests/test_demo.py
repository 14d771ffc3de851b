"""The demo from beginning to end, with few training steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


def test_demo_runs_the_whole_job_and_prints_one_json_object(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "cn_clip", "demo", f"--output={tmp_path}", "--steps=3", "--json"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert set(summary["text_to_image"]) == {"score", "mean_recall", "r1", "r5", "r10"}
    # 1,631 pictures: chance is 0.06 % at 1, and three steps do not get far.
    assert 0 <= summary["text_to_image"]["r1"] <= summary["image_to_text"]["r10"] <= 100
    assert 0 <= summary["zeroshot"] <= 1
    with Image.open(summary["grid"]) as grid:
        assert grid.format == "PNG"
        assert min(grid.size) > 400
    for name in ("valid_imgs.img_feat.jsonl", "valid_texts.txt_feat.jsonl"):
        assert len((tmp_path / "datasets" / "emoji" / name).read_bytes().splitlines()) == 1631
    assert "$ cn-clip zeroshot --datapath" in result.stderr
