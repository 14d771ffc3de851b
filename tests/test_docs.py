"""The documents are true: their commands run as written, their tables are the code's, what they point at is there."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import pytest
import safetensors
import shortcuts
import torch
import warm_python
from conftest import TOWERS
from dataset_files import jsonl_line, tsv_line, write_split
from documents import CHINESE, ENGLISH, ROOT, TIMES, Block, blocks, in_english, is_run, runners
from PIL import Image
from tiny_families import write_family

from cn_clip import models, zoo
from cn_clip.clip.model import CLIP, convert_weights
from cn_clip.clip.tokenizer import tokenize
from cn_clip.clip.transforms import image_transform
from cn_clip.clip.weights.checkpoint import read_checkpoint
from cn_clip.demo import emoji, tour
from cn_clip.evaluation import benchmark_sets
from cn_clip.preprocess import build_lmdb_dataset
from cn_clip.training.loss import Pairs, contrastive_scores
from cn_clip.training.monitor import METRICS, read_records

# What is exchanged in blocks that train: a full-size model and 128 pairs a step would take hours.
TRAINING = ("cn-clip train", "wise-ft", "checkpoint average", "_finetune_", "load_state_dict")
# So are blocks that export: a full-size model would take minutes, and not every processor computes in bfloat16.
DEPLOYING = ("/deploy", "openvino", "cn-clip convert", "compared/")
TRAINING_EXCHANGES = {
    "cn-clip train": "cn-clip train --num-workers 1 --valid-num-workers 0",
    'load_from_name("ViT-B-16"': 'load_from_name("small.pt"',
    'Encoder("ViT-B-16"': 'Encoder("small.pt"',
    "bf16": "fp32",
    "ViT-B-16": "ViT-Tiny-64",
    "RoBERTa-wwm-ext-base-chinese": "BERT-Tiny-chinese",
    "clip_cn_vit-b-16.pt": "small.pt",
    "--valid-batch-size 32": "--valid-batch-size 1",
    "batch_size=32": "batch_size=8",
    "batch-size 32": "batch-size 8",
    "batch_size=64": "batch_size=8",
    "batch-size 64": "batch-size 8",
    "max_epochs=30": "max_epochs=2",
    "--accum-freq 4": "--accum-freq 1",
    "--backends torch openvino --precisions fp32": "--backends torch --precisions fp32",
    "--batch-sizes 1 16": "--batch-sizes 1",
    "--max-epochs 30": "--max-epochs 2",
    "--max-epochs 3": "--max-epochs 1",
    "--max-epochs 4": "--max-epochs 2",
    "epoch3.pt": "epoch1.pt",
    "epoch4.pt": "epoch2.pt",
}
# The same for the scripts, which take their settings from the environment.
TRAINING_SETTINGS = {
    "vision_model": "ViT-Tiny-64",
    "text_model": "BERT-Tiny-chinese",
    "batch_size": "8",
    "valid_batch_size": "8",
    "valid_step_interval": "2",
    "max_epochs": "2",
}

# torchrun only shows that it and the training command understand their arguments: other tests start processes with it.
UNDERSTAND = "import sys; from torch.distributed.run import parse_args; from cn_clip.command import parse; "
UNDERSTAND += "from cn_clip.training.params import Options; given = parse_args(sys.argv[1:]); "
UNDERSTAND += "print(given.training_script, parse(Options, given.training_script_args))"
PROGRAMS = {"python": "", "python3": "", "cn-clip": "-m cn_clip", "torchrun": f"-c '{UNDERSTAND}'"}

# Of the pairs that blocks name, this one has a few layers; other tests see to its full size.
SMALL = "base"

NUM_PICTURES = 12
DATASET = "MUGE"


# --- the documents by themselves


PAGES = [page for page in CHINESE if in_english(page).is_file()]


def place(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def headings(page: Path) -> list[str]:
    """The levels of its headings, in order: "#", "##" ..."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^(#+) ", prose, re.MULTILINE)


def commands(page: Path) -> list[tuple[str, str]]:
    """What it gives to type or to read by a program; without comments, which are in the language of the page."""
    return [
        (block.language, re.sub(r"\s*#.*|[ \t]+$", "", block.code, flags=re.MULTILINE))
        for block in blocks(page)
        if block.language != "text"
    ]


def links(page: Path) -> list[str]:
    """Files that it links to, as written."""
    return re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))


def test_every_page_is_in_both_languages() -> None:
    assert sorted(map(place, ENGLISH)) == sorted(place(in_english(page)) for page in CHINESE)


@pytest.mark.parametrize("page", PAGES, ids=place)
def test_a_page_and_its_english_one_have_the_same_parts(page: Path) -> None:
    english = in_english(page)
    assert headings(english) == headings(page)
    assert commands(english) == commands(page)
    languages = [[block.language for block in blocks(one)] for one in (page, english)]
    assert languages[0] == languages[1]


@pytest.mark.parametrize("page", PAGES, ids=place)
def test_a_page_leads_to_itself_in_the_other_language(page: Path) -> None:
    english = in_english(page)
    for one, name, other in ((page, "English", english), (english, "中文", page)):
        third = one.read_text(encoding="utf-8").split("\n")[2]
        assert third == f"[{name}]({os.path.relpath(other, one.parent)})"


@pytest.mark.parametrize("page", PAGES, ids=place)
def test_links_of_a_page_stay_in_its_language(page: Path) -> None:
    pages = {path.resolve() for path in PAGES}
    for one, others in ((page, {in_english(path).resolve() for path in PAGES}), (in_english(page), pages)):
        strays = [link for link in links(one)[1:] if (one.parent / link).resolve() in others]
        assert strays == [], place(one)


@pytest.mark.parametrize("path", CHINESE, ids=place)
def test_shell_blocks_have_valid_syntax(path: Path) -> None:
    for block in blocks(path):
        if block.language == "bash":
            done = subprocess.run(["bash", "-n"], input=block.code, capture_output=True, text=True)
            assert done.returncode == 0, f"{block.where}: {done.stderr}"


@pytest.mark.parametrize("path", [*CHINESE, *ENGLISH], ids=place)
def test_links_lead_to_files_of_the_repository(path: Path) -> None:
    assert [link for link in links(path) if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("path", [CHINESE[0], ENGLISH[0]], ids=place)
def test_the_table_of_models_is_that_of_the_package(path: Path) -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| ([\d,]+) \|", path.read_text(encoding="utf-8"), re.MULTILINE)
    known: dict[str, zoo.Published | zoo.Bundled] = {**zoo.PUBLISHED, **zoo.BUNDLED}
    published = {name: models.describe(name, entry, ROOT) for name, entry in known.items()}
    assert dict(rows) == {name: f"{facts['num_params']:,}" for name, facts in published.items()}
    for name, facts in published.items():
        (row,) = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{name}` |")]
        shown = [f"{facts['num_visual_params']:,}", facts["text_model"], str(facts["resolution"]), f"`{facts['file']}`"]
        assert set(shown) <= {cell.strip() for cell in row.split("|")}


ARCHITECTURE = ROOT / "docs" / "architecture.md"


def test_the_page_on_architecture_says_where_things_are() -> None:
    text = in_english(ARCHITECTURE).read_text(encoding="utf-8")
    questions = text[text.index("## Where is it?") : text.index("## Rooms")]
    part = questions + text[text.index("## Three walks") : text.index("## A step of training")]
    files = re.findall(r"`([a-z_/0-9]+\.py)`", part)
    assert len(files) > 30
    for file in files:
        assert (ROOT / "cn_clip" / file).is_file(), file
    for names, file in re.findall(r"^\| [^|]+ \| (`[^|;]+?) (?:of|in) `([a-z_/0-9]+\.py)`", part, re.MULTILINE):
        for name in re.findall(r"`(?:\w+\.)?([A-Za-z_]+)`", names):
            assert re.search(rf"\b{name}\b", (ROOT / "cn_clip" / file).read_text(encoding="utf-8")), (name, file)


def test_both_pages_on_architecture_name_the_same_files() -> None:
    named = [
        re.findall(r"`([a-z_/0-9]+\.py)`", page.read_text(encoding="utf-8"))
        for page in (ARCHITECTURE, in_english(ARCHITECTURE))
    ]
    assert sorted(named[0]) == sorted(named[1])


@pytest.mark.parametrize("page", [ARCHITECTURE, in_english(ARCHITECTURE)], ids=place)
def test_the_page_on_architecture_names_every_module(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    modules = {path.stem for path in (ROOT / "cn_clip").rglob("*.py")} - {"__init__"}
    assert sorted(name for name in modules if f"`{name}`" not in text) == []


def test_every_test_that_the_differences_name_exists() -> None:
    text = (ROOT / "docs" / "differences.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", text)
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file}::{test}"


def test_every_document_with_commands_is_run_by_a_test() -> None:
    tests = runners()
    with_commands = [path.name for path in CHINESE if any(map(is_run, blocks(path)))]
    assert len(with_commands) > 8
    assert [name for name in with_commands if not tests[name]] == []


def test_the_tool_lists_every_command_and_the_test_that_runs_it() -> None:
    (written,) = (one.code.split() for one in blocks(ROOT / "docs" / "contributing.md") if is_run(one))
    assert written[0] == "python"
    tool = [sys.executable, *written[1:]]
    printed = subprocess.run(tool, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    commands = [one for path in CHINESE for one in blocks(path) if one.language in ("bash", "python")]
    assert [row.split(" | ")[0] for row in printed[2:]] == [f"| {one.where}" for one in commands]
    of_readme = "`tests/test_docs.py::test_the_commands_of_the_readme_run_from_api_to_zero_shot` |"
    assert sum(row.endswith(of_readme) for row in printed) > 10
    assert not any("没有 / none" in row for row in printed)


def test_the_page_of_commands_is_what_the_commands_say() -> None:
    tool = [sys.executable, str(ROOT / "tools" / "build_cli_docs.py"), "--check"]
    done = subprocess.run(tool, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def navigation(config: str) -> list[str]:
    return re.findall(r": ([\w/-]+\.md)$", (ROOT / config).read_text("utf-8").split("\nnav:\n")[1], re.MULTILINE)


def test_the_sites_have_every_page_in_their_navigation_in_one_order_and_no_other() -> None:
    chinese = navigation("mkdocs.yml")
    assert sorted(chinese) == sorted(map(place, CHINESE))
    assert navigation("mkdocs.en.yml") == [place(in_english(ROOT / page)) for page in chinese]


# --- the commands


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stand-ins: a few layers of random values under the published name of ViT-B-16, a small one and its towers.

    The small one has seen the twelve pictures a few times, so that a fine-tuning has something to lose.
    """
    folder = tmp_path_factory.mktemp("weights")
    (folder / "exported").mkdir()
    names = {
        "clip_cn_vit-b-16.pt": ("ViT-B-16", "RoBERTa-wwm-ext-base-chinese"),
        "small.pt": ("ViT-Tiny-64", "BERT-Tiny-chinese"),
    }
    for file, towers in names.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = CLIP.from_config(shortcuts.smaller(TOWERS, SMALL)(*towers))
            if file == "small.pt":
                train_somewhat(model)
        convert_weights(model)
        state = {f"module.{key}": value for key, value in model.state_dict().items()}
        torch.save({"epoch": 0, "step": 0, "name": file, "state_dict": state}, folder / file)
    parts = {"ViT-Tiny-64.pt": ("visual.", "logit_scale"), "chinese-roberta-wwm-ext/pytorch_model.bin": ("bert.",)}
    for file, names_of_part in parts.items():
        (folder / file).parent.mkdir(exist_ok=True)
        small = model.state_dict().items()
        torch.save({key: value for key, value in small if key.startswith(names_of_part)}, folder / file)
    return folder


def train_somewhat(model: CLIP) -> None:
    """24 steps on the twelve pictures and their names."""
    preprocess = image_transform(model.resolution)
    chosen = emoji.load()[:NUM_PICTURES]
    pixels = torch.stack([preprocess(Image.open(BytesIO(one.picture))) for one in chosen])
    tokens = tokenize([one.name for one in chosen])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    model.train()
    for _ in range(24):
        image, text, scale = model(pixels, tokens)
        contrastive_scores(Pairs(image, text, scale)).loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def recalls(folder: Path) -> tuple[float, float]:
    """Mean recall of a run at step 0 and at its end."""
    records, _ = read_records(folder / METRICS)
    validated = [record for record in records if record["kind"] == "valid"]
    assert (validated[0]["step"], validated[-1]["step"]) == (0, records[-1]["step"])
    first, last = (
        (record["text_to_image_mean_recall"] + record["image_to_text_mean_recall"]) / 2
        for record in (validated[0], validated[-1])
    )
    return first, last


def assert_not_worse(folder: Path) -> None:
    """The last validation of a run finds as much as that of step 0, and its log ends with a verdict."""
    first, last = recalls(folder)
    assert last >= first, folder
    (log,) = sorted(folder.glob("out_*.log"))[-1:]
    assert "| Verdict: " in log.read_text(encoding="utf-8").splitlines()[-1]


class Workplace:
    """A checkout (links into this one) and a DATAPATH with small data, in which blocks run as a reader runs them."""

    def __init__(self, folder: Path, weights: Path) -> None:
        self.checkout, self.data, self.programs = folder / "checkout", folder / "data", folder / "bin"
        for path in (self.checkout, self.data / "datasets", self.programs):
            path.mkdir(parents=True)
        for name in ("cn_clip", "run_scripts", "examples"):
            (self.checkout / name).symlink_to(ROOT / name)
        for name in ("clip_cn_vit-b-16.pt", "small.pt"):
            (self.checkout / name).symlink_to(weights / name)
        (self.data / "pretrained_weights").symlink_to(weights)
        # What one block exports is there for the others, in their default folder and in `download_root="./"`.
        for path in (self.checkout, self.data / ".cache" / "clip"):
            path.mkdir(parents=True, exist_ok=True)
            (path / "exported").symlink_to(weights / "exported")
        for program, arguments in PROGRAMS.items():
            path = self.programs / program
            path.write_text(f'#!/bin/sh\nexec "{warm_python.program()}" {arguments} "$@"\n')
            path.chmod(0o755)
        self._write_data()

    def _write_data(self) -> None:
        pictures = [(one, emoji.png(one)) for one in emoji.load()[:NUM_PICTURES]]
        images = [tsv_line(one.number, data) for one, data in pictures]
        texts = [jsonl_line(one.number, one.name, [one.number]) for one, _ in pictures]
        for split in ("train", "valid", "test"):
            write_split(self.data / "datasets" / DATASET, images, texts, split=split)
        folder = self.data / "pictures"
        folder.mkdir()
        rows = [f"{one.number:04d}{one.name}.png,{one.name}\n" for one, _ in pictures]
        (folder / "captions.csv").write_text("".join(["image,text\n", *rows]), encoding="utf-8")
        for row, (_, data) in zip(rows, pictures, strict=True):
            (folder / row.split(",")[0]).write_bytes(data)
        classes = self.data / "datasets" / "cifar-100"
        emoji.write_classification(classes, {label: emoji.CLASSES[label] for label in ("心", "猫脸")})
        for folder in classes.glob("test/*"):
            for path in sorted(folder.iterdir())[2:]:
                path.unlink()
        shutil.copytree(classes / "test", classes / "train")

    def run(self, block: Block) -> str:
        """What the block prints; fails with what it complained about."""
        code, small = re.sub(r'(?m)(= emoji\.load\("twemoji"\))(?= *(#|$))', r"\1[:100]", block.code), {}
        if "--init Emoji-Tiny" in code:
            code = code.replace("--max-epochs 10", "--max-epochs 4")
        elif any(word in code for word in (*TRAINING, *DEPLOYING)):
            for written, instead in TRAINING_EXCHANGES.items():
                code = code.replace(written, instead)
            small = {**TRAINING_SETTINGS, "init": str(self.data / "pretrained_weights" / "small.pt")}
        variables = {
            "DATAPATH": str(self.data),
            "dataset_name": DATASET,
            "PYTHONPATH": str(ROOT),
            "HOME": str(self.data),
            shortcuts.SMALL: SMALL,
        }
        # One thread: several at once on a busy machine wait for each other.
        quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        path, begun = f"{self.programs}{os.pathsep}{os.environ['PATH']}", time.monotonic()
        start = ["bash", "-euo", "pipefail"] if block.language == "bash" else [warm_python.program()]
        done = subprocess.run(
            [*start, "-c", code],
            cwd=self.checkout,
            env={**os.environ, **variables, **quiet, **small, "PATH": path},
            capture_output=True,
            text=True,
            timeout=240,
        )
        if TIMES in os.environ:
            row = {"where": block.where, "first_line": block.headline, "seconds": time.monotonic() - begun}
            with Path(os.environ[TIMES]).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
        assert done.returncode == 0, f"{block.where}\n{block.code}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def build(self) -> None:
        """Makes the LMDB of valid and train, for documents that begin after that."""
        build_lmdb_dataset.main(["--data_dir", str(self.data / "datasets" / DATASET), "--splits", "train,valid"])


@pytest.fixture
def workplace(tmp_path: Path, weights: Path, drawn: None) -> Workplace:
    return Workplace(tmp_path, weights)


def run_all(workplace: Workplace, path: Path, *, python_in_one_process: bool = False) -> dict[str, str]:
    """Runs the blocks of a document in order; what each printed, by its first line of code.

    python_in_one_process: those in Python come first, each with names of its own, for PyTorch is slow to import; what
    they printed is under "python".
    """
    found = [one for one in blocks(path) if is_run(one)]
    if python_in_one_process:
        codes = [one.code for one in found if one.language == "python"]
        everything = Block(path.name, "python", f"for code in {codes!r}:\n    exec(code, {{}})")
        python = {"python": workplace.run(everything)}
        return python | {one.code.split("\n")[0]: workplace.run(one) for one in found if one.language == "bash"}
    return {one.code.split("\n")[0]: workplace.run(one) for one in found}


def unignored(checkout: Path) -> list[str]:
    """What blocks left in a checkout that git would offer to add."""
    shutil.copy(ROOT / ".gitignore", checkout)
    subprocess.run(["git", "init", "-q"], cwd=checkout, check=True)
    listed = ["git", "ls-files", "--others", "--exclude-standard"]
    found = subprocess.run(listed, cwd=checkout, check=True, capture_output=True, text=True).stdout.splitlines()
    return [name for name in found if name != ".gitignore" and not (ROOT / name).exists()]


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=place)
def test_git_ignores_what_the_commands_of_a_guide_write_in_the_checkout(path: Path, tmp_path: Path) -> None:
    for block in blocks(path):
        for name in re.findall(r"(?:--output|--logs|--save-dir|-o)[= ](?!\w+:)([\w.][\w./-]*)", block.code):
            if not (ROOT / name).exists() and not name.startswith("."):
                (tmp_path / name.partition("/")[0]).mkdir(exist_ok=True)
                file = tmp_path / name if "/" in name else tmp_path / name / "file"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()
    assert unignored(tmp_path) == []


def num_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_the_commands_of_the_readme_run_from_api_to_zero_shot(workplace: Workplace) -> None:
    printed = run_all(workplace, ROOT / "README.md")
    assert unignored(workplace.checkout) == []
    api = printed["import torch "].splitlines()
    assert api[0] in (ROOT / "README.md").read_text(encoding="utf-8")
    assert api[-1].startswith("Label probs: [[")
    assert len(api[-1].split()) == 6
    dataset = workplace.data / "datasets" / DATASET
    for name in ("valid_imgs.img_feat", "valid_texts.txt_feat", "valid_predictions", "valid_tr_predictions"):
        assert num_lines(dataset / f"{name}.jsonl") == NUM_PICTURES
    assert json.loads((workplace.checkout / "output.json").read_text())["success"] is True
    (log,) = (workplace.data / "experiments").glob("muge*/out_*.log")
    assert "Validation Recall (epoch 2 @ 4 steps)" in log.read_text(encoding="utf-8")
    for folder in (log.parent, workplace.data / "experiments" / "mine"):
        assert_not_worse(folder)
    result = json.loads((workplace.data / "save_predictions" / "cifar-100.json").read_text())
    (written,) = [json.loads(one.code) for one in blocks(ROOT / "README.md") if "num_params" in one.code]
    assert result.keys() == written.keys()
    known = models.describe("ViT-B-16", zoo.PUBLISHED["ViT-B-16"], ROOT)
    sizes = {name: known[name] for name in ("num_params", "num_visual_params")}  # the model that ran has a few layers
    sizes["num_backbone_params"] = sizes["num_params"]
    assert written == {**result, **sizes, "predictions": written["predictions"]}


@pytest.mark.long
def test_the_commands_of_the_data_guide_run(workplace: Workplace) -> None:
    run_all(workplace, ROOT / "docs" / "data.md")
    datasets = workplace.data / "datasets"
    assert (datasets / "mine" / "lmdb").is_dir()
    assert (datasets / "mine-table" / "lmdb" / "valid" / "pairs" / "data.mdb").is_file()


@pytest.mark.long
def test_the_commands_of_the_fine_tuning_guide_run_and_one_goes_on(workplace: Workplace) -> None:
    workplace.build()
    printed = run_all(workplace, ROOT / "docs" / "finetune.md")
    experiments = workplace.data / "experiments"
    files = {path.name for path in (experiments / "mine" / "checkpoints").iterdir()}
    assert files - {"epoch_best.pt"} == {"epoch1.pt", "epoch2.pt", "epoch_latest.pt"}
    assert_not_worse(experiments / "mine")
    logs = [path.read_text(encoding="utf-8") for path in sorted((experiments / "mine").glob("out_*.log"))]
    assert "Start epoch 1" in logs[0]
    assert "Start epoch 1" not in logs[-1]
    (torchrun,) = (text for first, text in printed.items() if first.startswith("torchrun"))
    assert torchrun.startswith("cn_clip/training/main.py Options(")
    assert "gather_with_grad=True" in torchrun
    written = {"weights.pt", "mean.pt", "model.safetensors", "wise-ft.pt"}
    assert written <= {path.name for path in (experiments / "mine").iterdir()}
    assert "mean" in "".join(printed.values())
    before, one, two = (
        read_checkpoint(path).state_dict["visual.proj"].float()
        for path in (
            workplace.data / "pretrained_weights" / "ViT-Tiny-64.pt",
            *(experiments / f"stage{number}" / "checkpoints" / "epoch_latest.pt" for number in (1, 2)),
        )
    )
    assert torch.equal(one, before)
    assert not torch.equal(two, one)
    assert not any("lora" in name for name in read_checkpoint(experiments / "lora" / "merged.pt").state_dict)


@pytest.mark.long
def test_the_commands_of_the_tutorial_lead_from_a_folder_of_pictures_to_their_names(workplace: Workplace) -> None:
    pictures = workplace.data / "pictures"
    names = ["0001妙蛙种子.png", "0004小火龙.png", "0007杰尼龟.png", "0025皮卡丘.png"]
    for name, stand_in in zip(names, sorted(pictures.glob("*.png")), strict=False):
        stand_in.rename(pictures / name)
    printed = run_all(workplace, ROOT / "docs" / "tutorial-finetune.md")
    texts = (workplace.data / "datasets" / "pokemon" / "train_texts.jsonl").read_text(encoding="utf-8")
    assert {"妙蛙种子", "小火龙", "杰尼龟", "皮卡丘"} <= {json.loads(line)["text"] for line in texts.splitlines()}
    first, last = recalls(workplace.data / "experiments" / "emoji")
    assert last > first + 0.02
    assert_not_worse(workplace.data / "experiments" / "emoji")
    found = [text for code, text in printed.items() if code.startswith("cn-clip index build")]
    assert len(found) == 2
    assert "笑哭了" in found[0]
    assert found[1].count(".png\n") == 10
    folder = workplace.data / "experiments" / "pokemon"
    assert_not_worse(folder)
    assert {"epoch2.pt", "epoch_latest.pt"} <= {path.name for path in folder.glob("checkpoints/*")}
    assert {"metrics.jsonl", "curves.png"} <= {path.name for path in folder.iterdir()}
    (shares,) = (text.splitlines()[-4:] for first, text in printed.items() if "who is it" in first)
    assert sum(float(line.split(": ")[1]) for line in shares) == pytest.approx(1, abs=1e-3)
    assert {line.split(": ")[0] for line in shares} == {"杰尼龟", "妙蛙种子", "小火龙", "皮卡丘"}


@pytest.mark.long
def test_the_commands_of_the_deployment_guide_run(workplace: Workplace) -> None:
    workplace.build()
    printed = run_all(workplace, ROOT / "docs" / "deployment.md")
    written = {path.name for path in (workplace.data / "deploy").iterdir()}
    onnx = {f"vit-b-16.{tower}.{form}.onnx" for tower in ("txt", "img") for form in ("fp32", "fp16")}
    assert onnx | {"vit-b-16.text.mlpackage", "vit-b-16.image.mlpackage"} <= written
    assert "(2, 256)" in "".join(printed.values())
    assert {"bench.json", "bench.md", "bench.png"} <= {path.name for path in (workplace.checkout / "bench").iterdir()}
    (speeds,) = (text for text in printed.values() if "[ONNX text inference speed (batch-size: 1):]" in text)
    assert speeds.rstrip().endswith("Done!")


@pytest.mark.long
def test_the_commands_of_the_evaluation_guide_run(workplace: Workplace) -> None:
    workplace.build()
    printed = run_all(workplace, ROOT / "docs" / "evaluation.md")
    recall, zeroshot = (json.loads(text) for first, text in printed.items() if "--json" in first)
    assert recall["success"] is True
    assert [share["label"] for share in zeroshot["per_class"]] == ["心", "猫脸"]


@pytest.mark.long
def test_the_commands_of_the_comparison_guide_put_two_families_into_one_table(workplace: Workplace) -> None:
    pytest.importorskip("sentencepiece")
    pytest.importorskip("transformers", minversion="5")
    workplace.build()
    write_family(workplace.checkout / "models" / "siglip", "siglip")
    printed = run_all(workplace, ROOT / "docs" / "comparison.md")
    (table,) = (text for first, text in printed.items() if first.startswith("cn-clip compare"))
    assert (workplace.checkout / "compared" / "table.md").read_text(encoding="utf-8") == table
    names, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
    assert names[1:] == [
        f"{way} {one}" for way in ("text→image", "image→text") for one in ("R@1", "R@5", "R@10", "MR")
    ] + ["top-1"]
    assert [row[0] for row in rows[1:]] == ["Chinese-CLIP", "SigLIP"]
    assert not any("–" in row for row in rows[1:])


@pytest.mark.long
def test_the_snippets_of_the_faq_run_and_show_what_it_says(workplace: Workplace) -> None:
    workplace.build()
    printed = run_all(workplace, ROOT / "docs" / "faq.md", python_in_one_process=True)
    python = printed["python"]
    assert "{'batch': 12, 'lowest loss': 0.0, 'highest in-batch accuracy': 1.0}" in python
    assert "{'苹果': 1.0}\n" in python
    right = [int(share) for share in re.findall(r"precision (\d+)%", python)]
    assert right == pytest.approx([10, 25, 60], abs=3)
    assert "{'characters': 88, 'tokens': 90, 'kept by default': 52}\n(1, 256)\n" in python
    assert "'一', '只', 'cat', '在', 'so', '##fa', '上'" in python
    assert "'猫', '咪', '与', '圣', '诞', '树'" in python
    assert python.endswith("torch.float32\nfloat32\n")
    folder = workplace.data / "experiments" / "faq"
    weights, checkpoint = folder / "weights.pt", folder / "checkpoints" / "epoch_latest.pt"
    assert weights.stat().st_size * 3 < checkpoint.stat().st_size
    assert "['batch', 'length']" in "".join(printed.values())


@pytest.mark.long
def test_the_commands_of_the_zero_shot_guide_run(workplace: Workplace) -> None:
    printed = run_all(workplace, ROOT / "docs" / "zeroshot.md")
    (measured,) = (text for first, text in printed.items() if first.startswith("cn-clip evaluate"))
    assert "there are 2 labels, but CIFAR-100 has 100 classes, so this is not " in measured
    whole, few = (text for first, text in printed.items() if first.startswith("cn-clip linear-probe"))
    assert "seed 0: top-1" in whole
    assert "4 training images" in whole
    assert few.count("2 training images") == 3
    assert (workplace.data / "datasets" / "cifar-100" / "train.ViT-B-16.npz").is_file()
    table = re.findall(r"^\| `([\w-]+)` \| (\d+) \|", (ROOT / "docs" / "zeroshot.md").read_text("utf-8"), re.MULTILINE)
    known = {name: str(len(benchmark_sets.class_names(name))) for name in benchmark_sets.classification_sets()}
    assert dict(table) == known


@pytest.mark.long
def test_the_commands_of_the_search_guide_run(workplace: Workplace) -> None:
    printed = run_all(workplace, ROOT / "docs" / "search.md")
    built, _, again = (text for first, text in printed.items() if first.startswith("cn-clip index build"))
    assert f"{NUM_PICTURES} / {NUM_PICTURES} done" in built
    assert f"unchanged {NUM_PICTURES}" in again
    (python,) = (text for first, text in printed.items() if first.startswith("from cn_clip.clip import Encoder"))
    assert len(python.splitlines()) == 3
    assert "no problems found: photos.index" in "".join(printed.values())
    assert (workplace.checkout / "found.png").is_file()


@pytest.mark.long
def test_the_commands_of_the_conversion_guide_run(workplace: Workplace) -> None:
    (workplace.data / "models").mkdir()
    printed = run_all(workplace, ROOT / "docs" / "conversion.md")
    before, after = (
        read_checkpoint(path).state_dict
        for path in (workplace.checkout / "small.pt", workplace.data / "models" / "back.pt")
    )
    assert list(after) == list(before)
    assert all(value.float().equal(after[name]) for name, value in before.items())
    assert "ViT-Tiny-64 @ BERT-Tiny-chinese, 64 px" in "".join(printed.values())
    (shares,) = (text for first, text in printed.items() if first == "import os")
    assert shares.count(",") == 3


def test_the_commands_of_the_guide_on_reports_look_at_what_the_demo_leaves(workplace: Workplace) -> None:
    output = workplace.checkout / "demo-output"
    run = output / "experiments" / "emoji_seed123_steps60"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "epoch_latest.pt").symlink_to(workplace.checkout / "small.pt")
    shutil.copy(next(Path(__file__).parent.glob("golden/training_log/out_*.log")), run)
    workplace.build()
    (output / "datasets").mkdir()
    (output / "datasets" / "emoji").symlink_to(workplace.data / "datasets" / DATASET)
    few = {label: emoji.CLASSES[label] for label in ("时钟", "心", "猫脸")}
    assert list(emoji.drawn_classes("twemoji"))[: len(few)] == list(few)
    emoji.write_classification(output / "datasets" / "emoji-classes", few, vendor="twemoji")
    printed = run_all(workplace, ROOT / "docs" / "report.md")
    assert [text.count("report: report.html") for text in printed.values()] == [1, 1]
    page = (workplace.checkout / "report.html").read_text(encoding="utf-8")
    assert all(words in page for words in ("猫脸", "一只猫", "一条狗"))


def test_the_commands_of_the_page_on_models_run(workplace: Workplace) -> None:
    printed = "".join(run_all(workplace, ROOT / "docs" / "models.md").values())
    assert "QA-CLIP-ViT-B-16" in printed


def test_numbers_of_the_demo_and_of_the_bundled_model_are_those_of_their_source() -> None:
    whole, held_out = len(emoji.load("twemoji")), len(emoji.held_out(seed=0, share=tour.HELD_OUT, vendor="twemoji"))
    with safetensors.safe_open(str(zoo.BUNDLED["Emoji-Tiny"].path), framework="np") as file:
        about = file.metadata()
    measured = json.loads(about["twemoji"])["text_to_image"]["r1"]
    vendors = about["data"].split()
    for page in (ROOT / "README.md", ROOT / "README_En.md"):
        (told,) = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("`make demo`")]
        assert re.findall(r"\b\d,?\d\d\d?\b", told)[:3] == [f"{whole:,}", str(held_out), f"{whole - held_out:,}"]
    for page in (ROOT / "docs" / "search.md", ROOT / "docs" / "en" / "search.md"):
        (told,) = [one for one in page.read_text(encoding="utf-8").splitlines() if "benchmarks/upright.py" in one]
        assert f"{whole:,}" in told
        assert f"{measured:.0f} %" in told
    for page in (ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "en" / "benchmarks.md"):
        rows = page.read_text(encoding="utf-8").splitlines()
        (row,) = [one for one in rows if one.startswith("| Emoji-Tiny") and "torch fp32" in one]
        assert f"({whole:,} " in row
        # Versions of Pillow resize a little differently: three of the pictures may rank otherwise.
        shown = re.search(r"\| (\d+\.\d) /", row)
        assert shown is not None
        assert float(shown[1]) == pytest.approx(measured, abs=100 * 3 / whole + 0.05)
    card = (ROOT / "cn_clip" / "clip" / "bundled" / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert len(vendors) == 9
    assert "九套图画" in card
    assert "Nine sets of drawings" in card
    notebook = (ROOT / "notebooks" / "retrieval.ipynb").read_text(encoding="utf-8")
    assert "九套表情图片" in notebook
    assert "nine other sets" in notebook
