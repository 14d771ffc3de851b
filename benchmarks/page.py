"""The results of `side_by_side.py` as a page of one language, Chinese or English."""

# ruff: noqa: E501 - lines of the page

from collections.abc import Iterator
from typing import Any, Literal

COMMAND = """```bash
# {needs}
python benchmarks/side_by_side.py --reference-python REFERENCE/bin/python --data FLICKR8K_CN --output docs/benchmarks.md
```
"""
HEADS = {
    "zh": f"""# 推理速度对比

[English](en/benchmarks.md)

本页由一条命令生成，同一次运行里各方轮流计算，权重、图片和文本都相同。

{COMMAND.format(needs="需要对照环境和 flickr8k-cn 数据，约 25 分钟")}""",
    "en": f"""# Inference speed, side by side

[中文](../benchmarks.md)

This page is written by one command. In one run all contenders take turns on the same weights, images and texts.

{COMMAND.format(needs="needs the reference environment and the flickr8k-cn data; takes about 25 minutes")}""",
}


def render(
    found: dict[str, Any],
    missed: list[str],
    *,
    goals: dict[str, dict[str, float]],
    start_goal: float,
    language: Literal["zh", "en"] = "zh",
) -> str:
    """The whole page; `found` and `missed` as `side_by_side.run` has them."""
    parts = [HEADS[language], *PARTS[language](found, goals, start_goal)]
    return "\n".join([*parts, _verdict(missed, language)])


def _towers(found: dict[str, Any]) -> str:
    return "\n".join(
        f"| {row['name']} | {row['images']['per_s']:.1f} | {row['images']['ratio']:.2f}× | "
        f"{row['images']['cosine_min']:.5f} | {row['texts']['per_s']:.1f} | {row['texts']['ratio']:.2f}× | "
        f"{row['texts']['cosine_min']:.5f} | {row['peak_gb']:.2f} |"
        for row in found["towers"]
    )


def _stages(found: dict[str, Any], *, total: str, ratio: str) -> str:
    modes = list(found["modes"])
    stages = {**found["seconds"], total: found["total"]}
    rows = [
        f"| {name} | {times['reference']:.1f} | " + " | ".join(f"{times[mode]:.1f}" for mode in modes) + " |"
        for name, times in stages.items()
    ]
    ratios = " | ".join(f"**{found['ratio'][mode]:.2f}×**" for mode in modes)
    rule = f"| --- | ---: | {' | '.join('---:' for _ in modes)} |"
    return "\n".join([rule, *rows, f"| {ratio} | 1 | {ratios} |"])


def _trained(found: dict[str, Any]) -> str:
    return "\n".join(
        f"| {row['model']} | {row['mode']} | {' / '.join(f'{share:.1f}' for share in row['recall'])} | "
        f"{row['recall_change']:+.2f} | {row['image_cosine_min']:.5f} | {row['text_cosine_min']:.5f} | "
        f"{100 * row['top1_agreement']:.1f} % |"
        for row in found["trained"]
    )


def _chinese(found: dict[str, Any], goals: dict[str, dict[str, float]], start_goal: float) -> Iterator[str]:
    facts, start = found["facts"], found["start"]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    wanted = "；".join(
        f"{name}：图片 {goal['images']}×、文本 {goal['texts']:g}×、余弦 ≥ {goal['cosine']}"
        for name, goal in goals.items()
    )
    yield f"""
日期：{facts["date"]}。机器：{facts["machine"]}。版本：{versions}。
"""
    yield f"""
## 图片与文本

ViT-B-16 + RoBERTa-wwm-ext-base-chinese，随机权重，224×224 的 JPEG 字节到单位向量（解码与预处理计入），每批 {facts["image_batch"]} 张；
中文图片描述到单位向量（分词计入），每批 {facts["text_batch"]} 条，最长 52 个 token。每轮 {facts["num_pictures"]} 张、{facts["num_texts"]} 条，
{facts["rounds"]} 轮取中位数，另有一轮预热。余弦是与 PyTorch float32 结果的最小余弦。cn_clip 1.6.0 把文本都补齐到 52 个 token；
transformers 补齐到批内最长；本项目把长度相近的文本排在一起计算，再还原顺序。

| 方式 | 图片/秒 | 倍数 | 余弦 | 文本/秒 | 倍数 | 余弦 | 峰值内存 GB |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{_towers(found)}

目标：{wanted}。
"""
    yield f"""
## 启动

从启动进程到第一张图片的向量，模型已导出（openvino auto）：{start["ours"]:.2f} 秒，cn_clip 1.6.0：{start["reference"]:.2f} 秒；目标 ≤ {start_goal} 秒。
"""
    if "pipeline" in found:
        pipeline = found["pipeline"]
        modes, exports = list(pipeline["modes"]), pipeline["export_s"]
        yield f"""
## 整个检索流程

flickr8k-cn 验证集，{pipeline["pictures"]} 张图片、{pipeline["texts"]} 条描述：建 LMDB、提特征、双向 top-10、召回率，每一步都是一个独立进程，
与用户输入的命令相同；单位秒。导出只做一次，不计入（{"、".join(f"{mode} {exports[mode]:.0f} 秒" for mode in modes if exports[mode])}）。

| 阶段 | cn_clip 1.6.0 | {" | ".join(modes)} |
{_stages(pipeline, total="合计", ratio="倍数")}
"""
    yield f"""
## 训练好的模型

低精度对训练好的模型意味着什么：召回率（文→图 R@1/5/10，图→文 R@1/5/10，%），与 float32 相差最大的一项（百分点），
最小余弦，最佳匹配相同的比例。`Emoji-Tiny` 在没见过的 Twemoji 上；其余模型在 flickr8k-cn 验证集上，用它的训练集从零训练。

| 模型 | 方式 | 召回率 | 变化 | 图片余弦 | 文本余弦 | 首位相同 |
| --- | --- | --- | ---: | ---: | ---: | ---: |
{_trained(found)}
"""


def _english(found: dict[str, Any], goals: dict[str, dict[str, float]], start_goal: float) -> Iterator[str]:
    facts, start = found["facts"], found["start"]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    wanted = "; ".join(
        f"{name}: images {goal['images']}×, texts {goal['texts']:g}×, cosine ≥ {goal['cosine']}"
        for name, goal in goals.items()
    )
    yield f"""
Date: {facts["date"]}. Machine: {facts["machine"]}. Versions: {versions}.
"""
    yield f"""
## Images and texts

ViT-B-16 + RoBERTa-wwm-ext-base-chinese with random weights, from the bytes of 224×224 JPEGs to unit vectors (decoding and preprocessing
included), {facts["image_batch"]} per batch; from Chinese captions to unit vectors (tokenizing included), {facts["text_batch"]} per batch, at most 52 tokens.
{facts["num_pictures"]} images and {facts["num_texts"]} texts per round; medians of {facts["rounds"]} rounds after one for warm-up. The cosine is the smallest to
float32 in PyTorch. cn_clip 1.6.0 pads all texts to 52 tokens, transformers to the longest of the batch; this project computes texts of
similar length together and restores the order.

| Contender | Images/s | Ratio | Cosine | Texts/s | Ratio | Cosine | Peak memory GB |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{_towers(found)}

Goals: {wanted}.
"""
    yield f"""
## Startup

From starting the process to the vector of the first image, with the model exported before (openvino auto): {start["ours"]:.2f} seconds; cn_clip 1.6.0: {start["reference"]:.2f} seconds; goal ≤ {start_goal} seconds.
"""
    if "pipeline" in found:
        pipeline = found["pipeline"]
        modes, exports = list(pipeline["modes"]), pipeline["export_s"]
        yield f"""
## The whole retrieval pipeline

Validation set of flickr8k-cn, {pipeline["pictures"]} images and {pipeline["texts"]} captions: building the LMDB, extracting features, top-10 in both directions,
recall. Every stage is a separate process, the commands as a user types them; times in seconds. The export happens once and is not
counted ({", ".join(f"{mode} {exports[mode]:.0f} seconds" for mode in modes if exports[mode])}).

| Stage | cn_clip 1.6.0 | {" | ".join(modes)} |
{_stages(pipeline, total="total", ratio="ratio")}
"""
    yield f"""
## Trained models

What low precision means for trained models: recall (text → image R@1/5/10, image → text R@1/5/10, %), the largest change from float32 (in
points), the smallest cosines, and the share of equal best matches. `Emoji-Tiny` on Twemoji images it has not seen; other models on the
validation set of flickr8k-cn, trained from scratch on its training set.

| Model | Mode | Recall | Change | Image cosine | Text cosine | Same top-1 |
| --- | --- | --- | ---: | ---: | ---: | ---: |
{_trained(found)}
"""


PARTS = {"zh": _chinese, "en": _english}


def _verdict(missed: list[str], language: Literal["zh", "en"]) -> str:
    if not missed:
        return "\n" + {"zh": "全部目标达到。", "en": "All goals are met."}[language] + "\n"
    return (
        "\n"
        + {"zh": "未达到的目标：", "en": "Goals missed:"}[language]
        + "\n\n"
        + "\n".join(f"- {one}" for one in missed)
        + "\n"
    )
