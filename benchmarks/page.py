"""The page of inference speed, in both languages, from what `side_by_side.py` kept of each kind of processor:

python benchmarks/page.py --output docs/benchmarks.md

A file of benchmarks/results/ is one run on one processor. A row of the page names the processor it came from.
"""

# ruff: noqa: E501 - lines of the page

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cn_clip import command  # noqa: E402
from cn_clip.clip.backends.speeds import NAMES  # noqa: E402
from cn_clip.files import atomic_write  # noqa: E402

Found: TypeAlias = dict[str, Any]
Page: TypeAlias = Literal["zh", "en"]

RESULTS = ROOT / "benchmarks" / "results"
# What other programs and people put below is kept when the page is written again.
KEPT = "<!-- kept when side_by_side.py writes the page -->"
# Times as fast as the reference, and the smallest cosine to float32 that counts, by kind of processor: of the modes
# whose name ends so, "" being any of ours.
Goals: TypeAlias = dict[str, dict[str, float]]
GOALS: Goals = {
    "bf16": {"images": 2.5, "texts": 9.0, "cosine": 0.9995, "pipeline": 4.5},
    "int8": {"images": 3.5, "texts": 13.0, "cosine": 0.99, "pipeline": 6.0},
}
GOALS_ON: dict[str, Goals] = {"avx2": {"": {"images": 3.5, "texts": 10.0, "cosine": 0.99, "pipeline": 5.0}}}
START_GOAL = 2.5
MISSING = "—"

COMMAND = """```bash
# {needs}
python benchmarks/side_by_side.py --reference-python REFERENCE/bin/python --data FLICKR8K_CN --output docs/benchmarks.md
```
"""
HEADS = {
    "zh": f"""# 推理速度对比

[English](en/benchmarks.md)

本页由一条命令生成。一个处理器上的一行都来自同一次运行：各方轮流计算，权重、图片和文本都相同。各次运行的数值存在 `benchmarks/results/`，
每种处理器一个文件；再运行一次只替换这一种处理器的行。

{COMMAND.format(needs="需要对照环境和 flickr8k-cn 数据，约 20 分钟")}""",
    "en": f"""# Inference speed, side by side

[中文](../benchmarks.md)

This page is written by one command. The rows of a processor come from one run, in which all contenders take turns on the same weights,
images and texts. The numbers of each run are kept in `benchmarks/results/`, one file for each kind of processor; another run replaces the
rows of its kind.

{COMMAND.format(needs="needs the reference environment and the flickr8k-cn data; takes about 20 minutes")}""",
}


@dataclass(frozen=True)
class Options:
    """Writes the page of the results that are kept."""

    output: Path = ROOT / "docs" / "benchmarks.md"
    """The Chinese page; the English one goes into en/ beside it."""
    results: Path = RESULTS
    """Folder of the results."""


def run(options: Options) -> None:
    write(options.output, options.results)


def read(folder: Path) -> list[Found]:
    """The runs that are kept, the one with the most instructions first."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda one: -len(one["facts"]["instructions"]))


def write(output: Path, folder: Path = RESULTS) -> None:
    """Both pages; what stands below KEPT in them stays."""
    runs, languages = read(folder), {"zh": output, "en": output.parent / "en" / output.name}
    for language, path in languages.items():
        kept = path.read_text(encoding="utf-8").partition(KEPT)[2] if path.is_file() else ""
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as stream:
            stream.write(render(runs, language) + (f"\n{KEPT}{kept}" if kept else ""))  # type: ignore[arg-type]


def render(runs: Sequence[Found], language: Page) -> str:
    """The whole page."""
    return "\n".join([HEADS[language], *(_chinese(runs) if language == "zh" else _english(runs))])


def misses(found: Found) -> list[str]:
    """The goals that a run did not reach, in words; what it did not record counts neither way."""
    missed = []
    pipeline = found.get("pipeline") or {}
    for name, goal in GOALS_ON.get(found["facts"]["kind"], GOALS).items():
        label = name or "ours"
        own = [row for row in found["towers"] if _is_ours(row["name"]) and row["name"].endswith(name)]
        for work in ("images", "texts"):
            rows = [row[work] for row in own]
            if not rows:  # the processor lacks it
                continue
            good = [one["ratio"] for one in rows if (one["cosine_min"] or 1.0) >= goal["cosine"]]
            if (best := max(good, default=0.0)) < goal[work]:
                missed.append(f"{work} {label}: {best:.2f} times the reference, goal {goal[work]:g}")
        ratios = {mode: ratio for mode, ratio in pipeline.get("ratio", {}).items() if mode != "reference"}
        computed = {mode: ratio for mode, ratio in ratios.items() if _taken(pipeline, mode).endswith(name)}
        if computed and max(computed.values()) < goal["pipeline"]:
            missed.append(
                f"pipeline {label}: {max(computed.values()):.2f} times the reference, goal {goal['pipeline']:g}"
            )
    if found["start"] is not None and found["start"]["ours"] > START_GOAL:
        missed.append(f"start: {found['start']['ours']:.2f} s, goal {START_GOAL} s")
    missed += [
        f"{row['model']} {row['mode']}: recall moves by {row['recall_change']:.2f} points"
        for row in found["trained"]
        if abs(row["recall_change"]) > 0.5
    ]
    return missed + pipeline.get("missed", [])


def _is_ours(name: str) -> bool:
    return not name.startswith(("cn_clip", "transformers"))


def _taken(pipeline: Found, mode: str) -> str:
    """What "auto" took in the pipeline, else the mode itself."""
    return str(pipeline.get("taken", {}).get(mode, mode))


def short(found: Found) -> str:
    """What a row calls its processor: the arithmetic it has."""
    return NAMES[found["facts"]["kind"]]


def machine(found: Found, language: Page) -> str:
    """One line on where and when a run was made."""
    facts = found["facts"]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    name = f"{facts['processor']} ({', '.join(facts['instructions'])})" if facts["processor"] else short(found)
    parts = [f"{name}, {facts['cores']} cores, {facts['system']}", facts["date"], versions]
    told = "；".join(filter(None, parts)) if language == "zh" else "; ".join(filter(None, parts))
    return f"- **{short(found)}**{'：' if language == 'zh' else ': '}{told}"


def _machines(runs: Sequence[Found], language: Page) -> str:
    notes = [note[language == "en"] for found in runs for note in found["facts"].get("notes", ())]
    return "\n".join([*(machine(found, language) for found in runs), "", *(f"- {note}" for note in notes), ""])


def _number(value: float | None, form: str, unit: str = "") -> str:
    return MISSING if value is None else f"{value:{form}}{unit}"


def _towers(runs: Sequence[Found]) -> str:
    """A way to compute after the other, each on all processors."""
    names = dict.fromkeys(_way(row["name"]) for found in runs for row in found["towers"])
    return "\n".join(
        f"| {row['name']} | {short(found)} | {_number(row['images']['per_s'], '.1f')} | {_number(row['images']['ratio'], '.2f', '×')} | "
        f"{_number(row['images']['cosine_min'], '.5f')} | {_number(row['texts']['per_s'], '.1f')} | {_number(row['texts']['ratio'], '.2f', '×')} | "
        f"{_number(row['texts']['cosine_min'], '.5f')} | {_number(row['peak_gb'], '.2f')} |"
        for name in names
        for found in runs
        for row in found["towers"]
        if _way(row["name"]) == name
    )


def _way(name: str) -> str:
    """Auto is one way, whatever it took."""
    return "auto" if name.startswith("auto") else name


def _starts(runs: Sequence[Found]) -> str:
    return "\n".join(
        f"| {short(found)} | {found['start']['ours']:.2f} | {found['start']['reference']:.2f} |"
        for found in runs
        if found["start"] is not None
    )


def _pipelines(runs: Sequence[Found], *, total: str, ratio: str, stage: str, exports: str, none: str) -> str:
    tables = []
    for found in runs:
        pipeline = found.get("pipeline")
        if not pipeline:
            continue
        modes = pipeline["modes"]
        heads = [mode if _taken(pipeline, mode) == mode else f"{mode} ({_taken(pipeline, mode)})" for mode in modes]
        stages = {**pipeline["seconds"], **({total: pipeline["total"]} if pipeline["total"] else {})}
        ratios = " | ".join(f"**{pipeline['ratio'][mode]:.2f}×**" for mode in modes)
        told = ", ".join(f"{mode} {seconds:.0f} s" for mode, seconds in pipeline["export_s"].items() if seconds)
        counts = f"{pipeline['pictures']} / {pipeline['texts']}" if pipeline["pictures"] else none
        tables += [
            f"**{short(found)}** ({counts}{exports.format(told) if told else ''})",
            "",
            f"| {stage} | cn_clip 1.6.0 | {' | '.join(heads)} |",
            f"| --- | ---: | {' | '.join('---:' for _ in modes)} |",
            *(
                f"| {name} | {times['reference']:.1f} | " + " | ".join(f"{times[mode]:.1f}" for mode in modes) + " |"
                for name, times in stages.items()
            ),
            f"| {ratio} | 1 | {ratios} |",
            "",
        ]
    return "\n".join(tables)


def _trained(runs: Sequence[Found]) -> str:
    return "\n".join(
        f"| {row['model']} | {row['mode']} | {short(found)} | {' / '.join(f'{share:.1f}' for share in row['recall'])} | "
        f"{row['recall_change']:+.2f} | {row['image_cosine_min']:.5f} | {row['text_cosine_min']:.5f} | "
        f"{100 * row['top1_agreement']:.1f} % |"
        for found in runs
        for row in found["trained"]
    )


def _goals(runs: Sequence[Found], *, images: str, texts: str, whole: str, any_mode: str) -> str:
    lines = []
    for found in runs:
        for name, goal in GOALS_ON.get(found["facts"]["kind"], GOALS).items():
            lines.append(
                f"- {short(found)}, {name or any_mode}: {images} {goal['images']:g}×, {texts} {goal['texts']:g}×, "
                f"{whole} {goal['pipeline']:g}×, cos ≥ {goal['cosine']:g}"
            )
    return "\n".join(lines)


def _verdict(runs: Sequence[Found], *, met: str, missed: str) -> str:
    lines = [f"- {short(found)}: {one}" for found in runs for one in misses(found)]
    return "\n".join([missed, "", *lines]) if lines else met


def _chinese(runs: Sequence[Found]) -> Iterator[str]:
    facts = runs[0]["facts"]
    yield f"""
## 处理器

{_machines(runs, "zh")}
## 图片与文本

ViT-B-16 + RoBERTa-wwm-ext-base-chinese，随机权重，224×224 的 JPEG 字节到单位向量（解码与预处理计入），每批 {facts["image_batch"]} 张；
中文图片描述到单位向量（分词计入），每批 {facts["text_batch"]} 条，最长 52 个 token。每轮 {facts["num_pictures"]} 张、{facts["num_texts"]} 条，
{facts["rounds"]} 轮取中位数，另有一轮预热。倍数与同一处理器上的原版相比。余弦是与 PyTorch float32 结果的最小余弦。cn_clip 1.6.0 把文本都补齐到 52 个 token；
transformers 补齐到批内最长；本项目把长度相近的文本排在一起计算，再还原顺序。`auto` 是 `backend="auto", precision="auto"`，括号里是它所取的。

| 方式 | 处理器 | 图片/秒 | 倍数 | 余弦 | 文本/秒 | 倍数 | 余弦 | 峰值内存 GB |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{_towers(runs)}

## 启动

从启动进程到第一张图片的向量，模型已导出（openvino auto）；单位秒，目标 ≤ {START_GOAL}。

| 处理器 | 本项目 | cn_clip 1.6.0 |
| --- | ---: | ---: |
{_starts(runs)}

## 整个检索流程

flickr8k-cn 验证集：建 LMDB、提特征、双向 top-10、召回率，每一步都是一个独立进程，与用户输入的命令相同；单位秒。导出只做一次，不计入。

{_pipelines(runs, total="合计", ratio="倍数", stage="阶段", exports="；导出：{}", none="各阶段没有记下")}
## 训练好的模型

低精度对训练好的模型意味着什么：召回率（文→图 R@1/5/10，图→文 R@1/5/10，%），与 float32 相差最大的一项（百分点），
最小余弦，最佳匹配相同的比例。`Emoji-Tiny` 在没见过的 Twemoji 上；其余模型在 flickr8k-cn 验证集上，用它的训练集从零训练。

| 模型 | 方式 | 处理器 | 召回率 | 变化 | 图片余弦 | 文本余弦 | 首位相同 |
| --- | --- | --- | --- | ---: | ---: | ---: | ---: |
{_trained(runs)}

## 目标

{_goals(runs, images="图片", texts="文本", whole="整个流程", any_mode="最快的一种")}

{_verdict(runs, met="全部目标达到。", missed="未达到的目标：")}
"""


def _english(runs: Sequence[Found]) -> Iterator[str]:
    facts = runs[0]["facts"]
    yield f"""
## Processors

{_machines(runs, "en")}
## Images and texts

ViT-B-16 + RoBERTa-wwm-ext-base-chinese with random weights, from the bytes of 224×224 JPEGs to unit vectors (decoding and preprocessing
included), {facts["image_batch"]} per batch; from Chinese captions to unit vectors (tokenizing included), {facts["text_batch"]} per batch, at most 52 tokens.
{facts["num_pictures"]} images and {facts["num_texts"]} texts per round; medians of {facts["rounds"]} rounds after one for warm-up. The ratio is to the original on the same
processor. The cosine is the smallest to float32 in PyTorch. cn_clip 1.6.0 pads all texts to 52 tokens, transformers to the longest of the
batch; this project computes texts of similar length together and restores the order. `auto` is `backend="auto", precision="auto"`, with what
it took in brackets.

| Contender | Processor | Images/s | Ratio | Cosine | Texts/s | Ratio | Cosine | Peak memory GB |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{_towers(runs)}

## Startup

From starting the process to the vector of the first image, with the model exported before (openvino auto); seconds, goal ≤ {START_GOAL}.

| Processor | This project | cn_clip 1.6.0 |
| --- | ---: | ---: |
{_starts(runs)}

## The whole retrieval pipeline

Validation set of flickr8k-cn: building the LMDB, extracting features, top-10 in both directions, recall. Every stage is a separate process,
the commands as a user types them; times in seconds. The export happens once and is not counted.

{_pipelines(runs, total="total", ratio="ratio", stage="Stage", exports="; export: {}", none="stages not recorded")}
## Trained models

What low precision means for trained models: recall (text → image R@1/5/10, image → text R@1/5/10, %), the largest change from float32 (in
points), the smallest cosines, and the share of equal best matches. `Emoji-Tiny` on Twemoji images it has not seen; other models on the
validation set of flickr8k-cn, trained from scratch on its training set.

| Model | Mode | Processor | Recall | Change | Image cosine | Text cosine | Same top-1 |
| --- | --- | --- | --- | ---: | ---: | ---: | ---: |
{_trained(runs)}

## Goals

{_goals(runs, images="images", texts="texts", whole="whole pipeline", any_mode="the fastest")}

{_verdict(runs, met="All goals are met.", missed="Goals missed:")}
"""


if __name__ == "__main__":
    command.execute(run, Options)
