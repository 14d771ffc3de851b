"""The recall commands: the reference's result and error JSON byte for byte, and exit status 1 for an error."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import warm_python

from cn_clip.eval import evaluation, evaluation_tr, transform_ir_annotation_to_tr

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden" / "eval"
FAULTS = json.loads((GOLDEN / "faults.json").read_text())
COMMANDS = {"text": evaluation.main, "image": evaluation_tr.main}
ANNOTATIONS = {"text": "valid_texts.jsonl", "image": "valid_texts.tr.jsonl"}
TEN = list(range(10))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for path in GOLDEN.glob("valid_*.jsonl"):
        shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_lines(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def fails(query: str, *arguments: str) -> dict[str, Any]:
    """Runs the command, sees it end with status 1, and returns the error JSON."""
    with pytest.raises(SystemExit) as exit_info:
        COMMANDS[query]([*arguments, "result.json"])
    assert exit_info.value.code == 1
    error: dict[str, Any] = json.loads(Path("result.json").read_text())
    assert error == {
        "errorDetail": error["errorMsg"], "errorMsg": error["errorMsg"], "score": 0, "scoreJson": {}, "success": False
    }  # fmt: skip
    return error


@pytest.mark.parametrize(
    ("script", "annotation", "predictions", "result", "recorded", "readable"),
    [
        ("evaluation.py", "valid_texts.jsonl", "valid_predictions.jsonl", "result.json", "recall text",
         "R@1 8.89  R@5 40.00  R@10 62.22  MR 37.04"),
        ("evaluation_tr.py", "valid_texts.tr.jsonl", "valid_tr_predictions.jsonl", "tr_result.json", "recall image",
         "R@1 6.67  R@5 40.00  R@10 60.00  MR 35.56"),
    ],
)  # fmt: skip
def test_result_and_lines_are_those_of_the_reference(
    folder: Path, script: str, annotation: str, predictions: str, result: str, recorded: str, readable: str
) -> None:
    done = subprocess.run(
        [warm_python.program(), str(ROOT / "cn_clip" / "eval" / script), annotation, predictions, result],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (folder / result).read_bytes() == (GOLDEN / result).read_bytes()
    assert done.stdout == json.loads((GOLDEN / "printed.json").read_text())[recorded] + readable + "\n"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault['query']}: {fault['name']}")
def test_error_json_and_lines_are_those_of_the_reference(
    folder: Path, capsys: pytest.CaptureFixture[str], fault: dict[str, str]
) -> None:
    (folder / "faulty.jsonl").write_text(fault["submission"], encoding="utf-8")
    fails(fault["query"], ANNOTATIONS[fault["query"]], "faulty.jsonl")
    assert (folder / "result.json").read_text() == fault["result"]
    assert capsys.readouterr().out == fault["printed"]


@pytest.mark.parametrize("query", ["text", "image"])
@pytest.mark.parametrize("place", ["first line", "second line"])
def test_a_query_id_of_the_wrong_type_is_named(folder: Path, query: str, place: str) -> None:
    field, found = ("text_id", "image_ids") if query == "text" else ("image_id", "text_ids")
    before = [{field: 50, found: TEN}] if place == "second line" else []
    for wrong, shown in (("1022", "1022"), (1.5, "1.5"), (None, "None"), (True, "True"), ([1], "[1]")):
        submission = write_lines(folder / "faulty.jsonl", *before, {field: wrong, found: TEN})
        assert fails(query, ANNOTATIONS[query], submission)["errorMsg"] == (
            f"Found an invalid {field} {shown}, it should be an integer (not string), please check your schema"
        )


@pytest.mark.parametrize("line", ["5", '"text_id"', "null", "true"])
def test_a_line_that_is_no_object_lacks_the_query_id(folder: Path, line: str) -> None:
    (folder / "faulty.jsonl").write_text(line + "\n")
    message = fails("text", "valid_texts.jsonl", "faulty.jsonl")["errorMsg"]
    assert message == f"There exists one line not containing text_id: {line}"


def test_bytes_that_are_no_utf8_are_shown_as_escapes(folder: Path) -> None:
    (folder / "faulty.jsonl").write_bytes(b"\xff\xfe{\n")
    message = fails("text", "valid_texts.jsonl", "faulty.jsonl")["errorMsg"]
    assert message == "Cannot parse this line into json object: \\xff\\xfe{"


def test_string_ids_are_admitted_where_the_annotation_has_them(folder: Path) -> None:
    pictures = [f"图{number}" for number in range(10)]
    annotation = write_lines(folder / "a.jsonl", {"text_id": "甲", "image_ids": ["图4"]})
    submission = write_lines(folder / "p.jsonl", {"text_id": "甲", "image_ids": pictures})
    evaluation.main([annotation, submission, "result.json"])
    scores = json.loads((folder / "result.json").read_text())["scoreJson"]
    assert scores == {"score": 2 / 3 * 100, "mean_recall": 2 / 3 * 100, "r1": 0.0, "r5": 100.0, "r10": 100.0}


def scores_of(annotation: str, submission: str, query: str = "text") -> dict[str, float]:
    evaluation.main([annotation, submission, "result.json", "--query", query])
    result: dict[str, Any] = json.loads(Path("result.json").read_text())
    assert result["success"] is True
    return dict(result["scoreJson"])


@pytest.mark.parametrize("where", ["pictures", "texts", "both", "predicted too"])
@pytest.mark.parametrize("query", ["text", "image"])
def test_digits_in_quotes_are_the_integer(folder: Path, where: str, query: str) -> None:
    asked, found = ("text_id", "image_ids") if query == "text" else ("image_id", "text_ids")
    predictions = {"text": "valid_predictions.jsonl", "image": "valid_tr_predictions.jsonl"}[query]
    plain = scores_of(ANNOTATIONS[query], predictions, query)
    records = [json.loads(line) for line in Path(ANNOTATIONS[query]).read_text().splitlines()]
    predicted = [json.loads(line) for line in Path(predictions).read_text().splitlines()]
    for record in records if where != "predicted too" else [*records, *predicted]:
        if where != "texts":
            record[found] = list(map(str, record[found]))
        if where != "pictures":
            record[asked] = str(record[asked])
    annotation, submission = write_lines(folder / "a.jsonl", *records), write_lines(folder / "p.jsonl", *predicted)
    assert scores_of(annotation, submission, query) == plain
    if query == "text":
        transform_ir_annotation_to_tr.main(["--input", "a.jsonl"])
        assert (folder / "a.tr.jsonl").read_bytes() == (GOLDEN / "valid_texts.tr.jsonl").read_bytes()


def test_integers_that_differ_beyond_2_to_the_53_differ(folder: Path) -> None:
    large = 2**53
    annotation = write_lines(folder / "a.jsonl", {"text_id": 1, "image_ids": [str(large + 1)]})
    found = [large, *range(9)]
    assert scores_of(annotation, write_lines(folder / "p.jsonl", {"text_id": 1, "image_ids": found}))["r10"] == 0
    found = [large + 1, *range(9)]
    assert scores_of(annotation, write_lines(folder / "p.jsonl", {"text_id": 1, "image_ids": found}))["r1"] == 100


def test_leading_zeros_make_another_id(folder: Path) -> None:
    annotation = write_lines(folder / "a.jsonl", {"text_id": 1, "image_ids": ["007"]})
    submission = write_lines(folder / "p.jsonl", {"text_id": 1, "image_ids": [7, *range(10, 19)]})
    assert scores_of(annotation, submission)["r10"] == 0


def test_a_prediction_that_names_a_picture_as_integer_and_as_string_names_it_twice(folder: Path) -> None:
    annotation = write_lines(folder / "a.jsonl", {"text_id": 1, "image_ids": ["7"]})
    submission = write_lines(folder / "p.jsonl", {"text_id": 1, "image_ids": ["7", 7, *range(10, 18)]})
    assert "duplicate topk images" in fails("text", annotation, submission)["errorMsg"]


def test_byte_order_marks_and_carriage_returns_change_nothing(folder: Path) -> None:
    plain = scores_of("valid_texts.jsonl", "valid_predictions.jsonl")
    for name in ("valid_texts.jsonl", "valid_predictions.jsonl"):
        Path(name).write_bytes(b"\xef\xbb\xbf" + Path(name).read_bytes().replace(b"\n", b"\r\n"))
    assert scores_of("valid_texts.jsonl", "valid_predictions.jsonl") == plain


def test_string_queries_do_not_admit_string_pictures(folder: Path) -> None:
    annotation = write_lines(folder / "a.jsonl", {"text_id": "甲", "image_ids": [4]})
    submission = write_lines(folder / "p.jsonl", {"text_id": "甲", "image_ids": [str(number) for number in TEN]})
    assert fails("text", annotation, submission)["errorMsg"] == (
        "Text_id 甲 has an invalid predicted image_id 0 at rank 1, it should be an integer (not string), "
        "please check your schema"
    )


def test_missing_string_queries_are_listed_in_the_order_of_the_annotation(folder: Path) -> None:
    ids = ["丁", "甲", "丙", "乙", "戊"]
    annotation = write_lines(folder / "a.jsonl", *({"text_id": one, "image_ids": [1]} for one in ids))
    submission = write_lines(folder / "p.jsonl", {"text_id": "丙", "image_ids": TEN})
    message = fails("text", annotation, submission)["errorMsg"]
    assert message.endswith("have no prediction in your submission, please check again: 丁, 甲, 乙, 戊")


def test_missing_files_give_the_error_json(folder: Path) -> None:
    assert "absent.jsonl: cannot be opened" in fails("text", "absent.jsonl", "valid_predictions.jsonl")["errorMsg"]
    message = fails("image", "valid_texts.tr.jsonl", "absent.jsonl")["errorMsg"]
    assert message == "The submission file is not found!"
    assert ".: cannot be opened" in fails("text", "valid_texts.jsonl", ".")["errorMsg"]


def test_an_empty_annotation_gives_the_error_json(folder: Path) -> None:
    (folder / "empty.jsonl").write_text("")
    assert "empty.jsonl: the file has no lines" in fails("text", "empty.jsonl", "valid_predictions.jsonl")["errorMsg"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "a.jsonl:2: not valid JSON"),
        ('{"text_id": 1}', "a.jsonl:2: no field image_ids, only ['text_id']"),
        ('{"image_ids": [1]}', "a.jsonl:2: no field text_id, only ['image_ids']"),
        ('{"text_id": 1.5, "image_ids": [1]}', "a.jsonl:2 text_id: expected an integer or a string, got 1.5"),
        ('{"text_id": 1, "image_ids": 1}', "a.jsonl:2 image_ids: expected a list of integers or strings, got 1"),
        ('{"text_id": 1, "image_ids": [[1]]}', "a.jsonl:2 image_ids: expected a list of integers or strings"),
    ],
)
def test_a_faulty_annotation_is_named_with_file_and_line(folder: Path, line: str, message: str) -> None:
    (folder / "a.jsonl").write_text('{"text_id": 8, "image_ids": [1]}\n' + line + "\n")
    assert fails("text", "a.jsonl", "valid_predictions.jsonl")["errorMsg"].startswith(message)
    with pytest.raises(SystemExit) as exit_info:
        transform_ir_annotation_to_tr.main(["--input", "a.jsonl"])
    assert exit_info.value.code == 1
    assert not (folder / "a.tr.jsonl").exists()


@pytest.mark.parametrize("query", ["text", "image"])
def test_json_prints_the_result_and_nothing_else(folder: Path, capsys: pytest.CaptureFixture[str], query: str) -> None:
    predictions, result = {
        "text": ("valid_predictions.jsonl", "result.json"), "image": ("valid_tr_predictions.jsonl", "tr_result.json")
    }[query]  # fmt: skip
    evaluation.main([ANNOTATIONS[query], predictions, "out.json", "--query", query, "--json"])
    assert json.loads(capsys.readouterr().out) == json.loads((GOLDEN / result).read_text())
    with pytest.raises(SystemExit):
        evaluation.main([ANNOTATIONS[query], "absent", "out.json", "--query", query, "--json"])
    assert json.loads(capsys.readouterr().out)["errorMsg"] == "The submission file is not found!"


@pytest.mark.parametrize(("query", "fields"), [("text", ("text_id", "image_ids")), ("image", ("image_id", "text_ids"))])
def test_an_annotation_none_of_whose_ids_is_predicted_says_why_the_score_is_0(
    query: str, fields: tuple[str, str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [[77, 78], [79]]
    standard = write_lines(folder / "a.jsonl", *({fields[0]: n, fields[1]: ids} for n, ids in enumerate(found)))
    submit = write_lines(folder / "p.jsonl", *({fields[0]: n, fields[1]: TEN} for n in range(2)))
    COMMANDS[query]([standard, submit, "result.json"])
    captured = capsys.readouterr()
    assert "R@1 0.00" in captured.out
    assert f"none of the 3 {fields[1]} of {standard} is predicted for any query (one of them is 77, " in captured.err
    assert captured.err.count("\n") == 1
    assert json.loads((folder / "result.json").read_text())["success"] is True

    # Wrong ids, but those of the annotation: the score says it all.
    submit = write_lines(folder / "p.jsonl", *({fields[0]: n, fields[1]: [*TEN[1:], 79 - 2 * n]} for n in range(2)))
    COMMANDS[query]([standard, submit, "result.json"])
    assert capsys.readouterr().err == ""


def test_a_missing_result_folder_is_an_error_of_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        evaluation.main(["valid_texts.jsonl", "valid_predictions.jsonl", "absent/result.json"])
    assert exit_info.value.code == 1
    assert "the folder absent does not exist" in capsys.readouterr().err


def test_the_annotation_turned_round_is_that_of_the_reference(folder: Path) -> None:
    (folder / "valid_texts.tr.jsonl").unlink()
    script = str(ROOT / "cn_clip/eval/transform_ir_annotation_to_tr.py")
    command = [warm_python.program(), script, "--input", "valid_texts.jsonl"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "Done!\n"), done.stderr
    assert (folder / "valid_texts.tr.jsonl").read_bytes() == (GOLDEN / "valid_texts.tr.jsonl").read_bytes()


def test_an_empty_annotation_is_not_turned_round(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "empty.jsonl").write_text("")
    with pytest.raises(SystemExit):
        transform_ir_annotation_to_tr.main(["--input", "empty.jsonl"])
    assert "empty.jsonl: the file has no lines" in capsys.readouterr().err
    assert not (folder / "empty.tr.jsonl").exists()


def test_the_summary_of_turning_round_counts_pictures_and_texts(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transform_ir_annotation_to_tr.main(["--input", "valid_texts.jsonl", "--json"])
    summary = json.loads(capsys.readouterr().out)
    assert summary == {"output": "valid_texts.tr.jsonl", "num_texts": 45, "num_images": 30}
