"""The top-k commands: the reference's files and lines, as users type them, and what they refuse."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import warm_python

from cn_clip.eval import make_topk_predictions

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden" / "eval"
FEATURES = ["--image-feats", "valid_imgs.img_feat.jsonl", "--text-feats=valid_texts.txt_feat.jsonl"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("valid_imgs.img_feat.jsonl", "valid_texts.txt_feat.jsonl"):
        shutil.copy(GOLDEN / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_script(script: str, *arguments: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    path = str(ROOT / "cn_clip" / "eval" / script)
    return subprocess.run(
        [warm_python.program(), path, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("script", "recorded", "output"),
    [
        ("make_topk_predictions.py", "topk text", "valid_predictions.jsonl"),
        ("make_topk_predictions_tr.py", "topk image", "valid_tr_predictions.jsonl"),
    ],
)
def test_predictions_and_lines_are_those_of_the_reference(
    folder: Path, script: str, recorded: str, output: str
) -> None:
    done = run_script(script, *FEATURES, "--top-k=10", "--eval-batch-size=7", f"--output={output}", folder=folder)
    assert done.returncode == 0, done.stderr
    assert (folder / output).read_bytes() == (GOLDEN / output).read_bytes()
    expected = json.loads((GOLDEN / "printed.json").read_text())[recorded].replace("32768", "7").splitlines()
    printed = [line for line in done.stdout.splitlines() if line.split(":")[0] not in ("  device", "  json", "  query")]
    assert printed == expected


@pytest.mark.parametrize("batch", ["1", "29", "32768"])
def test_the_batch_size_does_not_change_the_file(folder: Path, batch: str) -> None:
    make_topk_predictions.main([*FEATURES, "--output", "out.jsonl", "--eval-batch-size", batch])
    assert (folder / "out.jsonl").read_bytes() == (GOLDEN / "valid_predictions.jsonl").read_bytes()


def test_the_query_flag_turns_the_direction_round(folder: Path) -> None:
    make_topk_predictions.main([*FEATURES, "--output", "out.jsonl", "--query", "image", "--device", "cpu"])
    assert (folder / "out.jsonl").read_bytes() == (GOLDEN / "valid_tr_predictions.jsonl").read_bytes()


def test_more_than_there_are_gives_all_of_them(folder: Path) -> None:
    make_topk_predictions.main([*FEATURES, "--output", "out.jsonl", "--top_k", "1000"])
    lines = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    shorter = [json.loads(line) for line in (GOLDEN / "valid_predictions.jsonl").read_text().splitlines()]
    assert {len(set(line["image_ids"])) for line in lines} == {30}
    assert [line["image_ids"][:10] for line in lines] == [line["image_ids"] for line in shorter]


def test_json_prints_one_object(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_topk_predictions.main([*FEATURES, "--output", "out.jsonl", "--json"])
    summary = json.loads(capsys.readouterr().out)
    assert summary.pop("load_seconds") > 0
    assert summary.pop("search_seconds") > 0
    assert summary == {"output": "out.jsonl", "query": "text", "num_queries": 45, "num_searched": 30, "top_k": 10}


@pytest.mark.parametrize(
    ("flag", "name"), [("--top-k", "--k"), ("--k", "--k"), ("--eval-batch-size", "--eval-batch-size")]
)
def test_counts_below_one_are_refused_with_status_2(
    folder: Path, capsys: pytest.CaptureFixture[str], flag: str, name: str
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        make_topk_predictions.main([*FEATURES, "--output", "out.jsonl", flag, "0"])
    assert exit_info.value.code == 2
    assert f"{name}: expected at least 1, got 0" in capsys.readouterr().err


def test_faulty_features_stop_the_run_and_leave_the_old_predictions(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "out.jsonl").write_text("old")
    (folder / "short.jsonl").write_text('{"text_id": 1, "feature": [0.5, 0.5]}\n')
    swapped = ["--image-feats", "valid_texts.txt_feat.jsonl", "--text-feats", "valid_imgs.img_feat.jsonl"]
    short = ["--image-feats", "valid_imgs.img_feat.jsonl", "--text-feats", "short.jsonl"]
    for arguments, message in (
        (swapped, "valid_texts.txt_feat.jsonl:1: no field image_id"),
        (short, "the text features have 2 numbers, the others 12"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            make_topk_predictions.main([*arguments, "--output", "out.jsonl"])
        assert exit_info.value.code == 1
        assert message in capsys.readouterr().err
    assert (folder / "out.jsonl").read_text() == "old"
    assert len(list(folder.iterdir())) == 4


@pytest.mark.parametrize("name", ["valid_imgs.img_feat.jsonl", "./valid_texts.txt_feat.jsonl"])
def test_features_are_never_overwritten(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / name).read_bytes()
    with pytest.raises(SystemExit) as exit_info:
        make_topk_predictions.main([*FEATURES, "--output", name])
    assert exit_info.value.code == 1
    assert f"--output {name}: would overwrite" in capsys.readouterr().err
    assert (folder / name).read_bytes() == before


def test_a_missing_output_folder_stops_before_the_features_are_read(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        make_topk_predictions.main([*FEATURES, "--output", "absent/out.jsonl"])
    streams = capsys.readouterr()
    assert "the folder absent does not exist" in streams.err
    assert "Begin to load" not in streams.out


def test_help_imports_neither_torch_nor_numpy() -> None:
    program = (
        "import sys\n"
        "from cn_clip.eval import evaluation_tr, make_topk_predictions_tr, transform_ir_annotation_to_tr\n"
        "for command in (evaluation_tr, make_topk_predictions_tr, transform_ir_annotation_to_tr):\n"
        "    try: command.main(['--help'])\n"
        "    except SystemExit as stop: assert stop.code == 0\n"
        "assert not {'torch', 'numpy'} & set(sys.modules), 'heavy imports'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "--query {text,image}" in done.stdout
