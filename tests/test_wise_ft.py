"""`cn-clip wise-ft`: mixtures of two models are exact at the ends, evaluated on the whole split, and written."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dataset_files import jsonl_line, run_script, tree, tsv_line, write_split
from deterministic import SMALL_MODEL, picture_bytes, state_dict
from PIL import Image
from tiny_models import tiny_model

from cn_clip import cli
from cn_clip.clip.encoder import Encoder
from cn_clip.clip.model import CLIP
from cn_clip.clip.weights.checkpoint import read_checkpoint
from cn_clip.data.lmdb_store import PairStore, read_split
from cn_clip.data.pictures import LmdbPictures, PictureDataset
from cn_clip.errors import DataError
from cn_clip.eval.wise_ft import table
from cn_clip.evaluation.retrieval import Point, interpolate
from cn_clip.retrieval.recall import Recall, RecallBothWays, recall_from_features
from cn_clip.training import adapt

NUM_PICTURES = 12
# Two texts for each of the first three pictures, one for the others; the last text belongs to two pictures.
TEXTS = [(number, f"第{number}张图片", [number % NUM_PICTURES]) for number in range(14)] + [(14, "两张图片", [2, 3])]


def png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture_bytes(number)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def lmdb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    pictures = [tsv_line(number, png(number)) for number in range(NUM_PICTURES)]
    write_split(folder, pictures, [jsonl_line(*text) for text in TEXTS], split="valid")
    built = run_script("preprocess/build_lmdb_dataset.py", "--data_dir", folder, "--splits", "valid")
    assert built.returncode == 0, built.stderr
    return folder / "lmdb" / "valid"


def small_model() -> CLIP:
    model = CLIP(**SMALL_MODEL)
    shapes = [(name, tuple(value.shape)) for name, value in model.state_dict().items()]
    model.load_state_dict({name: torch.from_numpy(value) for name, value in state_dict(shapes).items()})
    return model


def moved(model: CLIP, *, seed: int) -> CLIP:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`zero.pt` and `tuned.pt`, a training checkpoint."""
    folder = tmp_path_factory.mktemp("models")
    torch.save({"state_dict": small_model().state_dict()}, folder / "zero.pt")
    tuned = {f"module.{name}": value for name, value in moved(small_model(), seed=1).state_dict().items()}
    torch.save({"epoch": 2, "step": 5, "name": "tuned", "state_dict": tuned}, folder / "tuned.pt")
    return folder


def arguments(models: Path, lmdb: Path | None, *more: object) -> list[str]:
    data = [] if lmdb is None else ["--val-data", lmdb, "--num-workers=0", "--batch-size=5", "--device=cpu"]
    return list(map(str, ["--zeroshot", models / "zero.pt", "--finetuned", models / "tuned.pt", *data, *more]))


def call(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    cli.main(["wise-ft", *args, "--json"])
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def refusal(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit):
        cli.main(["wise-ft", *args])
    return capsys.readouterr().err


# --- the line


def test_a_mixture_is_the_weighted_mean_and_exact_at_both_ends() -> None:
    zero = {"w": torch.tensor([1.0, 0.1]), "count": torch.tensor(3)}
    tuned = {"w": torch.tensor([3.0, 0.7]), "count": torch.tensor(9)}
    assert interpolate(zero, tuned, 0.25)["w"].tolist() == pytest.approx([1.5, 0.25])
    assert interpolate(zero, tuned, 0.25)["count"].item() == 9
    assert torch.equal(interpolate(zero, tuned, 0.0)["w"], zero["w"])
    assert torch.equal(interpolate(zero, tuned, 1.0)["w"], tuned["w"])


def test_the_table_marks_the_best_mean_of_both_directions() -> None:
    def point(alpha: float, *shares: float) -> Point:
        text, image = (Recall(dict(zip((1, 5, 10), part, strict=True))) for part in (shares[:3], shares[3:]))
        return Point(alpha, RecallBothWays(text, image))

    points = [point(0, 0.1, 0.2, 0.3, 0.2, 0.3, 0.4), point(0.5, 0.4, 0.5, 0.6, 0.1, 0.2, 0.3)]
    assert [one.recall.mean for one in points] == pytest.approx([0.25, 0.35])
    assert points[0].values() == {"alpha": 0, **points[0].recall.values(), "mean_recall": points[0].recall.mean}
    lines = [line.split() for line in table(points, points[1])]
    assert lines[1] == ["0", "10.00", "20.00", "30.00", "20.00", "30.00", "40.00", "25.00"]
    assert lines[2] == ["0.5", "40.00", "50.00", "60.00", "10.00", "20.00", "30.00", "35.00", "best"]


def test_the_split_has_every_text_once_and_every_pair(lmdb: Path) -> None:
    pairs = PairStore(lmdb / "pairs")
    split = read_split(pairs, list(range(NUM_PICTURES)))
    assert split.texts == [text for _, text, _ in TEXTS]
    assert split.pairs == [(image, number) for number, _, images in TEXTS for image in images]
    with pytest.raises(DataError, match=r"pair \d+ names the picture 11, which is missing"):
        read_split(pairs, list(range(11)))


# --- as typed


def recall_of(model: CLIP, lmdb: Path) -> RecallBothWays:
    """By the encoder users have, in one batch."""
    encoder = Encoder(model, device="cpu")
    source = LmdbPictures(lmdb / "imgs")
    pictures = PictureDataset(source, encoder.transform.array)
    pixels = np.stack([pictures[index][1] for index in range(NUM_PICTURES)])
    texts = encoder.encode_texts([text for _, text, _ in TEXTS])
    pairs = [(source.ids.index(image), number) for number, _, images in TEXTS for image in images]
    return recall_from_features(encoder.backend.encode_pixels(pixels), texts, np.array(pairs))


def test_the_line_is_evaluated_and_the_best_mixture_written(models: Path, lmdb: Path, tmp_path: Path) -> None:
    args = arguments(models, lmdb, "--alphas=1,0,0.5,0.5", "--output", tmp_path / "best.pt", "--json")
    done = run_script("eval/wise_ft.py", *args)
    assert (done.returncode, done.stderr) == (0, "")  # no progress bar into a file
    result = json.loads(done.stdout)
    assert [point["alpha"] for point in result["points"]] == [0.0, 0.5, 1.0]
    states = [read_checkpoint(models / name).state_dict for name in ("zero.pt", "tuned.pt")]
    middle = {name: (value + states[1][name]) / 2 for name, value in states[0].items()}
    for point, state in zip(result["points"], (states[0], middle, states[1]), strict=True):
        model = CLIP(**SMALL_MODEL)
        model.load_state_dict(state)
        recall = recall_of(model, lmdb)
        assert [point[f"text_to_image_r{k}"] for k in (1, 5, 10)] == list(recall.text_to_image.at.values())
        assert [point[f"image_to_text_r{k}"] for k in (1, 5, 10)] == list(recall.image_to_text.at.values())
    best = max(result["points"], key=lambda point: point["mean_recall"])
    assert result["best_alpha"] == result["alpha"] == best["alpha"]
    written = torch.load(tmp_path / "best.pt", weights_only=True)
    assert {key: written[key] for key in ("epoch", "step", "name")} == {"epoch": 2, "step": 5, "name": "tuned"}
    assert written["wise_ft"]["alpha"] == best["alpha"]
    mixed = interpolate(states[0], states[1], best["alpha"])
    assert all(torch.equal(written["state_dict"][f"module.{name}"], value) for name, value in mixed.items())


def test_the_table_is_printed_for_people(models: Path, lmdb: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["wise-ft", *arguments(models, lmdb, "--alphas=0,1")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["alpha", "text→image", "R@1"]
    assert [line.split()[0] for line in lines[1:]] == ["0", "1"]
    assert sum("best" in line for line in lines) == 1


def test_a_chosen_mixture_is_written_without_data(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = call(capsys, *arguments(models, None, "--alpha=0.25", "--output", tmp_path / "quarter.pt"))
    assert result == {"points": [], "best_alpha": None, "output": str(tmp_path / "quarter.pt"), "alpha": 0.25}
    zero, tuned, mixed = (
        read_checkpoint(path).state_dict["text_projection"]
        for path in (models / "zero.pt", models / "tuned.pt", tmp_path / "quarter.pt")
    )
    torch.testing.assert_close(mixed, 0.75 * zero + 0.25 * tuned)


def test_adapters_are_merged_before_mixing(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small_model()
    adapt.add_lora(model, 2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    settings = adapt.lora_settings(model)
    assert settings is not None
    torch.save({"state_dict": adapt.file_names(model.state_dict()), "lora": settings.entry()}, tmp_path / "tuned.pt")
    (tmp_path / "zero.pt").write_bytes((models / "zero.pt").read_bytes())
    call(capsys, *arguments(tmp_path, None, "--alpha=0.5", "--output", tmp_path / "half.pt"))
    zero, tuned, half = (read_checkpoint(tmp_path / f"{name}.pt").state_dict for name in ("zero", "tuned", "half"))
    name = "visual.transformer.resblocks.0.attn.in_proj_weight"
    assert not torch.equal(zero[name], tuned[name])
    torch.testing.assert_close(half[name], (zero[name] + tuned[name]) / 2)
    assert half.keys() == zero.keys()


# --- refusals


def test_models_of_other_shapes_are_refused_naming_the_tensor(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": tiny_model().state_dict()}, tmp_path / "tuned.pt")
    (tmp_path / "zero.pt").write_bytes((models / "zero.pt").read_bytes())
    before = tree(tmp_path)
    error = refusal(capsys, *arguments(tmp_path, None, "--alpha=0.5", "--output", tmp_path / "half.pt"))
    assert "zero.pt and " in error
    assert "text_projection is (64, 32) and (64, 24)" in error
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ([], "--val-data: expected the LMDB folder of a split"),
        (["--alpha=0.5"], "--alpha: chooses the mixture to write; add --output"),
        (["--alpha=1.5", "--output=x.pt"], "--alpha: expected 0 to 1, got 1.5"),
        (["--val-data=d", "--alphas=0,two"], "--alphas: expected numbers with commas between, got '0,two'"),
        (["--val-data=d", "--alphas=0,2"], "--alphas: expected values from 0 to 1, got '0,2'"),
        (["--val-data=d", "--alphas="], "--alphas: expected numbers with commas between, got ''"),
        (["--val-data=d", "--batch-size=0"], "--batch-size: expected at least 1, got 0"),
        (["--val-data=/nowhere"], "/nowhere"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    more: list[str], reason: str, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refusal(capsys, *arguments(models, None, *more)).replace("│", "")  # the parser's box wraps lines
    assert "".join(reason.split()) in "".join(error.split())


def test_an_output_that_cannot_be_written_is_told_before_the_evaluation(
    models: Path, lmdb: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refusal(capsys, *arguments(models, lmdb, "--output", tmp_path / "none" / "x.pt"))
    assert f"the folder {tmp_path}/none does not exist" in error
    assert "picture" not in error  # no progress bar was begun


def test_weights_that_are_no_numbers_name_their_checkpoint(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small_model()
    with torch.no_grad():
        model.visual.proj[0, 0] = float("nan")  # type: ignore[index]
    torch.save({"state_dict": model.state_dict()}, tmp_path / "tuned.pt")
    (tmp_path / "zero.pt").write_bytes((models / "zero.pt").read_bytes())
    error = refusal(capsys, *arguments(tmp_path, None, "--alpha=0.5", "--output", tmp_path / "half.pt"))
    assert f"{tmp_path}/tuned.pt: visual.proj holds NaN or infinity" in error
    assert not (tmp_path / "half.pt").exists()


def test_an_input_is_never_overwritten(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (models / "tuned.pt").read_bytes()
    error = refusal(capsys, *arguments(models, None, "--alpha=0.5", "--output", models / "tuned.pt"))
    assert "would overwrite" in error
    assert (models / "tuned.pt").read_bytes() == before
