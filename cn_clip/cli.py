"""The command `cn-clip`: a table of names and modules; each module's `main` does the work.

cn-clip <command> [options]
"""

import importlib
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from cn_clip import __version__, spelling, terminal
from cn_clip.language import both

PROG = "cn-clip"


class Command(NamedTuple):
    """The module whose `main(args)` runs a command, and what the command does, in both languages."""

    module: str
    chinese: str
    english: str


COMMANDS: dict[str, Command] = {
    "demo": Command("cn_clip.demo.main", "用内置的表情图片跑通全流程", "the whole job on embedded emoji pictures"),
    "models": Command("cn_clip.models", "列出已发布的和随包的模型", "list the published and bundled models"),
    "download": Command("cn_clip.download", "下载模型，可续传，并校验", "download a model, resumed and checked"),
    "dataset build": Command(
        "cn_clip.preprocess.build_lmdb_dataset", "把 tsv 与 jsonl 打包成 LMDB", "pack tsv and jsonl files into LMDB"
    ),
    "dataset from-folder": Command(
        "cn_clip.preprocess.dataset_from_folder", "用图片文件夹生成数据集", "make a dataset from a folder of pictures"
    ),
    "dataset check": Command(
        "cn_clip.preprocess.check_dataset", "检查数据集，列出全部问题", "check a dataset and list every fault"
    ),
    "dataset shards": Command(
        "cn_clip.preprocess.write_shards", "把数据集写成 WebDataset 分片", "write WebDataset shards from a dataset"
    ),
    "train": Command("cn_clip.training.main", "训练或微调模型", "train or fine-tune a model"),
    "features": Command("cn_clip.eval.extract_features", "提取图文特征", "extract picture and text features"),
    "topk": Command("cn_clip.eval.make_topk_predictions", "检索最相近的前 k 个", "find the k nearest"),
    "recall": Command("cn_clip.eval.evaluation", "计算检索结果的召回率", "compute the recall of what was found"),
    "report": Command(
        "cn_clip.report.main", "把一次训练和模型的表现写成一个网页", "a page on a run: curves, queries, confusions"
    ),
    "zeroshot": Command(
        "cn_clip.eval.zeroshot_evaluation", "零样本图像分类", "classify pictures by label names, without training"
    ),
    "evaluate": Command(
        "cn_clip.eval.evaluate", "按名字跑评测集，与公布的指标并列", "run a benchmark by name, beside published figures"
    ),
    "linear-probe": Command(
        "cn_clip.eval.linear_probe", "在冻结的特征上训练线性分类器", "train a linear classifier on frozen features"
    ),
    "compare": Command("cn_clip.eval.compare", "把多个结果并成一张表", "merge results into one table"),
    "index build": Command(
        "cn_clip.index.build", "用图片建立索引，再次运行则更新", "make an index of pictures, or bring it up to date"
    ),
    "index add": Command("cn_clip.index.add", "向索引添加图片", "add pictures to an index"),
    "index remove": Command("cn_clip.index.remove", "从索引移除图片", "remove pictures from an index"),
    "index info": Command("cn_clip.index.info", "查看索引的内容", "tell what an index holds"),
    "index check": Command("cn_clip.index.check", "检查索引，可修复", "check an index, and repair it"),
    "index watch": Command(
        "cn_clip.index.watch", "跟着文件夹随时更新索引", "follow a folder, and keep an index up with it"
    ),
    "index duplicates": Command(
        "cn_clip.index.duplicates", "列出相同和相近的图片", "list equal and nearly equal pictures"
    ),
    "search": Command("cn_clip.index.search", "以文或以图搜图", "find pictures by text or by picture"),
    "wise-ft": Command(
        "cn_clip.eval.wise_ft", "混合零样本与微调权重", "mix zero-shot and fine-tuned weights, and measure recall"
    ),
    "serve": Command("cn_clip.serve.main", "HTTP 服务：向量、分类、检索", "vectors, labels and search over HTTP"),
    "mcp": Command("cn_clip.serve.agents", "给智能体（MCP）用的检索工具", "search tools for agents (MCP)"),
    "checkpoint info": Command("cn_clip.checkpoints.info", "查看权重文件的内容", "tell what a weight file holds"),
    "checkpoint strip": Command(
        "cn_clip.checkpoints.strip", "只保留权重，去掉优化器状态", "keep the weights, drop the optimizer state"
    ),
    "checkpoint average": Command("cn_clip.checkpoints.average", "多个检查点取平均", "average several checkpoints"),
    "checkpoint export": Command(
        "cn_clip.checkpoints.export", "导出为 safetensors", "write the weights as safetensors"
    ),
    "convert": Command(
        "cn_clip.checkpoints.convert", "权重格式互转：.pt、safetensors、transformers", "one form of weights as another"
    ),
    "export tensorrt": Command(
        "cn_clip.deploy.onnx_to_tensorrt", "由 ONNX 构建 TensorRT 引擎", "build TensorRT engines from ONNX files"
    ),
    "export coreml": Command("cn_clip.deploy.pytorch_to_coreml", "导出为 Core ML", "write Core ML packages"),
    "export onnx": Command(
        "cn_clip.deploy.pytorch_to_onnx", "导出为 ONNX，附对照报告", "write ONNX files, and how close"
    ),
    "bench": Command(
        "cn_clip.deploy.bench", "测量本机各后端的速度与内存", "measure the speed and memory of backends on this machine"
    ),
}


def main(args: Sequence[str] | None = None) -> None:
    """Runs one command and exits with its status; status 2 with one line for a command that does not exist."""
    given = list(sys.argv[1:] if args is None else args)
    with terminal.ending():
        if given[:1] == ["help"] and len(given) > 1:
            given = [*given[1:], "--help"]
        if not given or given[0] in ("-h", "--help", "help"):
            print(help_text())
            return
        if given[0] in ("-V", "--version"):
            print(f"{PROG} {__version__}")
            return
        name, rest = split(given)
        if name in COMMANDS:
            sys.argv[0] = f"{PROG} {name}"
            importlib.import_module(COMMANDS[name].module).main(rest)
        elif family(name) and rest[:1] in (["-h"], ["--help"]):
            print(help_text(f"{name} "))
        else:
            terminal.fail(refusal(name, rest), status=2)


def split(args: Sequence[str]) -> tuple[str, list[str]]:
    """(command name of one or two words, its arguments)."""
    length = 2 if " ".join(args[:2]) in COMMANDS else 1
    return " ".join(args[:length]), list(args[length:])


def family(name: str) -> list[str]:
    """The commands whose first of two words is `name`, as in "dataset build"; often none."""
    return [known for known in COMMANDS if known.startswith(f"{name} ")]


def refusal(name: str, rest: Sequence[str]) -> str:
    """One line on a command that does not exist: what was typed, and the nearest that exists."""
    relatives = family(name)
    if relatives and not rest:
        hint = _one_of(relatives)
        return both(f"命令 {name!r} 不完整；{hint}", f"incomplete command {name!r}; {hint}")
    # The shared first word would make all of a family look near. Of commands with the same last word the first counts.
    candidates = {known.split()[-1]: known for known in reversed(list(relatives or COMMANDS))}
    typed = rest[0] if relatives else name
    nearest = spelling.nearest(typed, candidates)
    if nearest:
        command = f"`{PROG} {candidates[nearest]}`"
        hint = both(f"是否想用 {command}？", f"did you mean {command}?")
    else:
        hint = _one_of(relatives or COMMANDS)
    unknown = f"{name} {typed}" if relatives else name
    return both(f"没有命令 {unknown!r}；{hint}", f"no command {unknown!r}; {hint}")


def _one_of(names: Iterable[str]) -> str:
    listed = ", ".join(names)
    return both(f"可用的命令：{listed}", f"expected one of: {listed}")


def help_text(prefix: str = "") -> str:
    """The table of the commands whose name begins with `prefix`."""
    rows = [
        (f"  {name}", both(known.chinese, known.english)) for name, known in COMMANDS.items() if name.startswith(prefix)
    ]
    return "\n".join(
        [
            f"{PROG} {__version__}" + both("：中文图文模型 Chinese-CLIP", ": Chinese-CLIP, Chinese image-text models"),
            "",
            both(f"用法：{PROG} <命令> [选项]", f"usage: {PROG} <command> [options]"),
            "",
            *terminal.align(rows),
            "",
            both(
                f"`{PROG} <命令> --help` 列出该命令的选项", f"`{PROG} <command> --help` lists the options of a command"
            ),
        ]
    )
