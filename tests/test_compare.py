"""`cn-clip compare`: results in one table, worked by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cn_clip import cli
from cn_clip.errors import DataError
from cn_clip.eval import compare


def write_recall(path: Path, r1: float, r5: float = 50.0, r10: float = 75.0) -> Path:
    mean = (r1 + r5 + r10) / 3
    scores = {"score": mean, "mean_recall": mean, "r1": r1, "r5": r5, "r10": r10}
    path.write_text(json.dumps({"success": True, "score": mean, "scoreJson": scores}), encoding="utf-8")
    return path


def write_zeroshot(path: Path, top1: float, top5: float | None = None) -> Path:
    result = {"zeroshot-top1": top1, "zeroshot-top5": top5, "per_class": [], "predictions": "x.json"}
    path.write_text(json.dumps(result), encoding="utf-8")
    return path


def write_benchmark(path: Path, measured: object) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"benchmark": "b", "split": "test", "measured": measured, "published": None}))
    return path


def test_results_become_rows_with_the_best_in_bold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = write_recall(tmp_path / "ours.json", 25.0, 50.0)
    other = write_recall(tmp_path / "r.json", 12.5, 62.5)
    zero = write_zeroshot(tmp_path / "z.json", 0.875)
    output = tmp_path / "table.md"
    cli.main(["compare", str(ours), f"CLIP={other}", f"CLIP={zero}", "--output", str(output)])
    expected = """\
| model | R@1 | R@5 | R@10 | MR | top-1 |
| --- | ---: | ---: | ---: | ---: | ---: |
| ours | **25.00** | 50.00 | **75.00** | **50.00** | – |
| CLIP | 12.50 | **62.50** | **75.00** | **50.00** | 87.50 |
"""
    assert capsys.readouterr().out == expected
    assert output.read_text(encoding="utf-8") == expected


def test_groups_tell_directions_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, back = write_recall(tmp_path / "t2i.json", 25.0), write_recall(tmp_path / "i2t.json", 37.5)
    cli.main(["compare", f"theirs/文搜图={found}", f"ours/文搜图={found}", f"ours/图搜文={back}", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["columns"] == [f"text→image {one}" for one in ("R@1", "R@5", "R@10", "MR")] + [
        f"image→text {one}" for one in ("R@1", "R@5", "R@10", "MR")
    ]


def test_both_directions_of_a_benchmark_stand_beside_those_of_recall(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recall = {"r1": 12.5, "r5": 25.0, "r10": 75.0, "mean_recall": 37.5}
    both = write_benchmark(tmp_path / "ours" / "result.json", {"text": recall, "image": recall | {"r1": 87.5}})
    found = write_recall(tmp_path / "t2i.json", 25.0)
    cli.main(["compare", str(both), f"CLIP/文搜图={found}"])
    head, _, *rows = capsys.readouterr().out.splitlines()
    columns = [f"{way} {one}" for way in ("text→image", "image→text") for one in ("R@1", "R@5", "R@10", "MR")]
    assert head == f"| model | {' | '.join(columns)} |"
    assert rows == [
        "| ours | 12.50 | 25.00 | **75.00** | 37.50 | 87.50 | 25.00 | 75.00 | 37.50 |",
        "| CLIP | **25.00** | **50.00** | **75.00** | **50.00** | – | – | – | – |",
    ]


def test_a_benchmark_of_one_direction_and_one_of_classes_share_a_row(tmp_path: Path) -> None:
    muge = write_benchmark(tmp_path / "muge" / "result.json", {"text": {"r1": 50.0, "mean_recall": 62.5}})
    classes = {"top1": 75.0, "mean_per_class": 62.5, "map_11_point": 50.0}
    voc = write_benchmark(tmp_path / "voc" / "result.json", classes)
    sources = [compare.source_of(f"ours/MUGE={muge}"), compare.source_of(f"ours={voc}")]
    assert compare.merged(sources) == {
        "ours": {
            "MUGE text→image R@1": 50.0,
            "MUGE text→image MR": 62.5,
            "top-1": 75.0,
            "mean per class": 62.5,
            "11-point mAP": 50.0,
        }
    }


def test_a_linear_probe_does_not_share_the_column_of_zero_shot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Two classes on either side of 0; of three test rows of class a, one lies on the side of b, as that of b does.
    train = {"features": [[1.0], [2.0], [-1.0], [-2.0]], "labels": [0, 0, 1, 1]}
    test = {"features": [[1.0], [2.0], [-1.0], [-2.0]], "labels": [0, 0, 0, 1]}
    for name, arrays in (("train", train), ("test", test)):
        features = np.array(arrays["features"], dtype=np.float32)
        np.savez(tmp_path / f"{name}.npz", features=features, labels=np.array(arrays["labels"]))
    zero = write_zeroshot(tmp_path / "zero.json", 0.5)
    sources = [f"ours={zero}"]
    for shots in ([], ["--shots", "1"]):
        files = ["--train", str(tmp_path / "train.npz"), "--test", str(tmp_path / "test.npz")]
        cli.main(["linear-probe", *files, *shots, "--c", "1", "--json"])
        path = tmp_path / f"probe{len(shots)}.json"
        path.write_text(capsys.readouterr().out, encoding="utf-8")
        sources.append(f"ours={path}")
    cli.main(["compare", *sources, "--json"])
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    probe, mean = "linear probe", "mean per class"
    assert row == {
        "name": "ours",
        "top-1": 50.0,
        f"{probe} top-1": 75.0,
        f"{probe} {mean}": pytest.approx(100 * (2 / 3 + 1) / 2),
        f"{probe} 1-shot top-1": 75.0,
        f"{probe} 1-shot {mean}": pytest.approx(100 * (2 / 3 + 1) / 2),
    }


def test_json_holds_unrounded_percentages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zero = write_zeroshot(tmp_path / "emoji.json", 1 / 3, 2 / 3)
    cli.main(["compare", str(zero), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["columns"] == ["top-1", "top-5"]
    assert result["rows"] == [{"name": "emoji", "top-1": pytest.approx(100 / 3), "top-5": pytest.approx(200 / 3)}]


def test_values_that_look_the_same_are_both_best() -> None:
    table = {"a": {"R@1": 33.3333}, "b": {"R@1": 33.3349}, "c": {"R@1": 33.32}}
    assert [line.split(" | ")[-1] for line in compare.markdown(table)[2:]] == ["**33.33** |", "**33.33** |", "33.32 |"]


def test_names_cannot_break_the_table() -> None:
    assert compare.markdown({"a|b\\": {"x|y": 1.0}}) == [
        "| model | x\\|y |",
        "| --- | ---: |",
        "| a\\|b\\\\ | 1.00 |",
    ]


def test_a_file_with_an_equals_sign_in_its_name_is_a_file(tmp_path: Path) -> None:
    path = write_recall(tmp_path / "lr=1.json", 25.0)
    assert compare.source_of(str(path)) == ("lr=1", "", path)
    assert compare.source_of(f"a/b/c={path}") == ("a", "b/c", path)


def test_a_result_without_a_name_bears_that_of_its_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert compare.source_of("evaluations/muge-valid-ours/result.json").row == "muge-valid-ours"
    (tmp_path / "ours").mkdir()
    monkeypatch.chdir(tmp_path / "ours")
    assert compare.source_of("result.json").row == "ours"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "holds a list"),
        ("{}", "has none of scoreJson, zeroshot-top1, measured, runs with values in it; expected what"),
        ('{"scoreJson": null}', "has none of scoreJson"),
        ('{"measured": [], "runs": []}', "has none of scoreJson"),
        ('{"measured": {"text": 50, "top5": 50}}', "has none of scoreJson"),
        ('{"measured": {"image": {"r5": 101}}}', "r5: expected a number from 0 to 100, got 101"),
        ('{"runs": [], "top1": -1}', "top1: expected a number from 0 to 100, got -1"),
        ('{"success": false, "errorDetail": "no such id", "scoreJson": {}}', r"the evaluation failed \(no such id\)"),
        ('{"scoreJson": {"r1": "25"}}', "r1: expected a number from 0 to 100, got '25'"),
        ('{"zeroshot-top1": 87.5}', "zeroshot-top1: expected a number from 0 to 1, got 87.5"),
        ('{"zeroshot-top1": NaN}', "expected a number"),
        ('{"zeroshot-top1": true}', "expected a number"),
    ],
)
def test_what_is_no_result_is_refused_and_nothing_written(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=words):
        compare.run(compare.Options(results=(str(path),), output=str(tmp_path / "table.md")))
    assert not (tmp_path / "table.md").exists()


@pytest.mark.parametrize(
    ("results", "words"),
    [
        (["nowhere.json"], "nowhere.json: cannot be read"),
        (["=r.json"], "expected NAME=FILE"),
        (["a=r.json", "a=r.json"], "the row 'a' has a value of R@1 already"),
        (["a=r.json", "--output", "r.json"], "--output"),
    ],
)
def test_what_cannot_be_a_table_is_one_line(
    results: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_recall(tmp_path / "r.json", 25.0)
    with pytest.raises(SystemExit):
        cli.main(["compare", *results])
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json"]


def test_without_a_result_it_says_what_is_expected(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["compare"])
    assert "expected result files" in capsys.readouterr().err


@given(st.dictionaries(st.text(min_size=1), st.floats(0, 100), min_size=1))
def test_every_row_of_a_table_has_the_same_cells(values: dict[str, float]) -> None:
    lines = compare.markdown({name: {"R@1": value} for name, value in values.items()})
    assert {len(line.replace("\\\\", "").replace("\\|", "").split("|")) for line in lines} == {4}
    assert sum("**" in line.rsplit("|", 2)[-2] for line in lines) >= (len(values) > 1)
