"""The results of `side_by_side.py` as a page, in Chinese and English."""

# ruff: noqa: E501 - lines of the page

from typing import Any

HEAD = """# 推理速度对比 / Inference, side by side

本页由一条命令生成，同一次运行里各方轮流计算，权重、图片和文本都相同。
This page is written by one command; in one run all contenders take turns on the same weights, pictures and texts.

```bash
# 需要对照环境和 flickr8k-cn 数据，约 25 分钟 / needs the reference's environment and flickr8k-cn, about 25 minutes
python benchmarks/side_by_side.py --reference-python REFERENCE/bin/python --data FLICKR8K_CN --output docs/benchmarks.md
```
"""


def render(found: dict[str, Any], missed: list[str], *, goals: dict[str, dict[str, float]], start_goal: float) -> str:
    """The whole page; `found` and `missed` as `side_by_side.run` has them."""
    parts = [HEAD, _machine(found["facts"]), _towers(found, goals), _start(found["start"], start_goal)]
    if "pipeline" in found:
        parts.append(_pipeline(found["pipeline"]))
    parts += [_trained(found["trained"]), _verdict(missed)]
    return "\n".join(parts)


def _machine(facts: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    return f"""
日期 / date: {facts["date"]}。机器 / machine: {facts["machine"]}。版本 / versions: {versions}。
"""


def _towers(found: dict[str, Any], goals: dict[str, dict[str, float]]) -> str:
    facts = found["facts"]
    rows = [
        f"| {row['name']} | {row['images']['per_s']:.1f} | {row['images']['ratio']:.2f}× | "
        f"{row['images']['cosine_min']:.5f} | {row['texts']['per_s']:.1f} | {row['texts']['ratio']:.2f}× | "
        f"{row['texts']['cosine_min']:.5f} | {row['peak_gb']:.2f} |"
        for row in found["towers"]
    ]
    wanted = "；".join(
        f"{name}: 图片 {goal['images']}×、文本 {goal['texts']:g}×、余弦 ≥ {goal['cosine']}"
        for name, goal in goals.items()
    )
    return f"""
## 图片与文本 / Pictures and texts

ViT-B-16 + RoBERTa-wwm-ext-base-chinese，随机权重，224×224 的 JPEG 字节到单位向量（解码与预处理计入），每批 {facts["image_batch"]} 张；
中文图片描述到单位向量（分词计入），每批 {facts["text_batch"]} 条，最长 52 个 token。每轮 {facts["num_pictures"]} 张、{facts["num_texts"]} 条，
{facts["rounds"]} 轮取中位数，另有一轮预热。余弦是与 PyTorch float32 结果的最小余弦。cn_clip 1.6.0 把文本都补齐到 52 个 token；
transformers 补齐到批内最长；本项目把长度相近的文本排在一起算，再还原顺序。
From JPEG bytes and strings to unit vectors; medians of {facts["rounds"]} rounds after one to warm up; cosines are the smallest to
float32 in PyTorch.

| 方式 / contender | 图片/秒 pictures/s | 倍数 ratio | 余弦 cosine | 文本/秒 texts/s | 倍数 ratio | 余弦 cosine | 峰值内存 peak GB |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{chr(10).join(rows)}

目标 / goals: {wanted}。
"""


def _start(start: dict[str, float], goal: float) -> str:
    return f"""
## 启动 / Start

从启动进程到第一张图片的向量，模型已导出（openvino auto）：{start["ours"]:.2f} 秒，cn_clip 1.6.0：{start["reference"]:.2f} 秒；目标 ≤ {goal} 秒。
From the start of the process to the first vector, the model exported before.
"""


def _pipeline(found: dict[str, Any]) -> str:
    modes = list(found["modes"])
    stages = {**found["seconds"], "合计 / total": found["total"]}
    rows = [
        f"| {name} | {times['reference']:.1f} | " + " | ".join(f"{times[mode]:.1f}" for mode in modes) + " |"
        for name, times in stages.items()
    ]
    ratios = " | ".join(f"**{found['ratio'][mode]:.2f}×**" for mode in modes)
    return f"""
## 整个检索流程 / The whole retrieval pipeline

flickr8k-cn 验证集，{found["pictures"]} 张图片、{found["texts"]} 条描述：建 LMDB、提特征、双向 top-10、召回率，每一步都是一个独立进程，
与用户敲的命令相同；单位秒。导出只做一次，不计入（{"、".join(f"{mode} {found['export_s'][mode]:.0f} 秒" for mode in modes if found["export_s"][mode])}）。
Seconds; every stage is a process of its own, the commands as users type them. The export happens once and is not counted.

| 阶段 / stage | cn_clip 1.6.0 | {" | ".join(modes)} |
| --- | ---: | {" | ".join("---:" for _ in modes)} |
{chr(10).join(rows)}
| 倍数 / ratio | 1 | {ratios} |
"""


def _trained(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"| {row['model']} | {row['mode']} | {' / '.join(f'{share:.1f}' for share in row['recall'])} | "
        f"{row['recall_change']:+.2f} | {row['image_cosine_min']:.5f} | {row['text_cosine_min']:.5f} | "
        f"{100 * row['top1_agreement']:.1f} % |"
        for row in rows
    ]
    return f"""
## 训练好的模型 / Trained models

低精度对训练好的模型意味着什么：召回率（文→图 R@1/5/10，图→文 R@1/5/10，%），与 float32 相差最大的一项（百分点），
最小余弦，最佳匹配相同的比例。`Emoji-Tiny` 在没见过的 Twemoji 上；其余模型在 flickr8k-cn 验证集上，用它的训练集从零训练。
Recall of text to picture and picture to text, the largest change from float32 in points, smallest cosines, equal best matches.

| 模型 / model | 方式 / mode | 召回率 / recall | 变化 / change | 图片余弦 | 文本余弦 | 首位相同 top-1 |
| --- | --- | --- | ---: | ---: | ---: | ---: |
{chr(10).join(lines)}
"""


def _verdict(missed: list[str]) -> str:
    if not missed:
        return "\n全部目标达到。All goals are met.\n"
    return "\n未达到的目标 / goals missed:\n\n" + "\n".join(f"- {line}" for line in missed) + "\n"
