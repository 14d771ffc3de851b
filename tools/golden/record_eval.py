"""Records tests/golden/eval from the reference's top-k and recall scripts, on small made-up features.

REFERENCE/bin/python tools/golden/record_eval.py
"""

import contextlib
import io
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden" / "eval"
NUM_IMAGES, NUM_TEXTS, DIMENSIONS = 30, 45, 12
EVALUATIONS = {"text": "evaluation", "image": "evaluation_tr"}
PREDICTIONS = {"text": "valid_predictions.jsonl", "image": "valid_tr_predictions.jsonl"}
ANNOTATIONS = {"text": "valid_texts.jsonl", "image": "valid_texts.tr.jsonl"}


def run_reference(name: str, *arguments: str) -> str:
    """What the reference's script prints."""
    sys.argv = [name, *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_module(f"cn_clip.eval.{name}", run_name="__main__")
    return printed.getvalue()


def write_lines(path: str, records: list[dict[str, Any]]) -> None:
    Path(path).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def vectors(generator: np.random.Generator, rows: int) -> np.ndarray:
    """Half of them eighths, whose products are exact and often equal; half unit vectors of full precision."""
    drawn = generator.standard_normal((rows, DIMENSIONS))
    units = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    return np.where(np.arange(rows)[:, None] % 2, units, np.round(drawn) / 8).astype(np.float32)


def write_inputs() -> None:
    generator = np.random.default_rng(20221103)
    image_ids = [int(number) for number in 1000 + generator.permutation(NUM_IMAGES) * 7]
    text_ids = [int(number) for number in 50 + generator.permutation(NUM_TEXTS) * 3]
    for field, file, ids in (
        ("image_id", "valid_imgs.img_feat.jsonl", image_ids),
        ("text_id", "valid_texts.txt_feat.jsonl", text_ids),
    ):
        rows = vectors(generator, len(ids)).tolist()
        write_lines(file, [{field: one, "feature": row} for one, row in zip(ids, rows, strict=True)])
    annotation = []
    for number, text_id in enumerate(text_ids):
        relevant = [image_ids[number % NUM_IMAGES], *generator.choice(image_ids, 3).tolist()][: number % 5]
        annotation.append({"text_id": text_id, "text": f"第{number}句", "image_ids": list(dict.fromkeys(relevant))})
    write_lines("valid_texts.jsonl", annotation)


def record_results() -> dict[str, str]:
    features = ["--image-feats=valid_imgs.img_feat.jsonl", "--text-feats=valid_texts.txt_feat.jsonl"]
    return {
        "topk text": run_reference("make_topk_predictions", *features, f"--output={PREDICTIONS['text']}"),
        "topk image": run_reference("make_topk_predictions_tr", *features, f"--output={PREDICTIONS['image']}"),
        "transform": run_reference("transform_ir_annotation_to_tr", "--input", "valid_texts.jsonl"),
        "recall text": run_reference("evaluation", ANNOTATIONS["text"], PREDICTIONS["text"], "result.json"),
        "recall image": run_reference("evaluation_tr", ANNOTATIONS["image"], PREDICTIONS["image"], "tr_result.json"),
    }


def faulty_submissions(query: str) -> dict[str, str]:
    """Prediction files with one fault each."""
    field, found = ("text_id", "image_ids") if query == "text" else ("image_id", "text_ids")
    lines = Path(PREDICTIONS[query]).read_text(encoding="utf-8").splitlines()
    third = json.loads(lines[2])
    ids = third[found]

    def with_third(line: str | dict[str, Any]) -> str:
        return "\n".join([*lines[:2], line if isinstance(line, str) else json.dumps(line)]) + "\n"

    return {
        "no JSON": with_third("{'a': 1}"),
        "blank line": with_third("  "),
        "Chinese that is no JSON": with_third("第三行"),
        "list": with_third("[1, 2]"),
        "no query id": with_third({found: ids}),
        "no found ids": with_third({field: third[field], "ids": ids}),
        "found ids no list": with_third({**third, found: "1, 2, 3"}),
        "nine": with_third({**third, found: ids[:9]}),
        "eleven": with_third({**third, found: [*ids, 1]}),
        "string among the found": with_third({**third, found: [*ids[:4], str(ids[4]), *ids[5:]]}),
        "float among the found": with_third({**third, found: [*ids[:9], 1.5]}),
        "twice the same": with_third({**third, found: [*ids[:9], ids[0]]}),
        "four without prediction": "\n".join(lines[:3] + lines[7:]),
        "empty": "",
    }


def record_faults(query: str) -> list[dict[str, str]]:
    recorded = []
    for name, content in faulty_submissions(query).items():
        Path("faulty.jsonl").write_text(content, encoding="utf-8")
        printed = run_reference(EVALUATIONS[query], ANNOTATIONS[query], "faulty.jsonl", "fault.json")
        result = Path("fault.json").read_text(encoding="utf-8")
        recorded.append({"name": name, "query": query, "submission": content, "printed": printed, "result": result})
    Path("faulty.jsonl").unlink()
    Path("fault.json").unlink()
    return recorded


def main() -> None:
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    GOLDEN.mkdir(parents=True, exist_ok=True)
    os.chdir(GOLDEN)
    write_inputs()
    printed = record_results()
    Path("printed.json").write_text(json.dumps(printed, indent=1) + "\n", encoding="utf-8")
    faults = record_faults("text") + record_faults("image")
    Path("faults.json").write_text(json.dumps(faults, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
