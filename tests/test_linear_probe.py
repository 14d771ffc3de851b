"""Linear probing: optima known by hand and from scikit-learn, the choice of C, draws of shots, the command."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_families import write_family

from cn_clip import cli
from cn_clip.clip import load_from_name
from cn_clip.clip.backends.pytorch import TorchBackend
from cn_clip.clip.encoder import Encoder
from cn_clip.command import Speaker
from cn_clip.data.pictures import ClassFolders
from cn_clip.demo import emoji
from cn_clip.errors import ConfigError, DataError
from cn_clip.evaluation import classification, logistic

LABELS = ("时钟", "心", "猫脸", "圆", "正方形")

# --- the fit


def test_the_optimum_of_two_opposite_points_is_that_worked_by_hand() -> None:
    # Rows 1 and -1 of one feature, classes 1 and 0, weights -w/2 and w/2, c = 1: the objective is
    # 2 log(1 + e^-w) + w²/4, least where w (1 + e^w) = 4; the bias is 0 by symmetry.
    low, high = 0.0, 4.0
    for _ in range(60):
        w = (low + high) / 2
        low, high = (w, high) if w * (1 + np.exp(w)) < 4 else (low, w)
    found = logistic.fit(np.array([[1], [-1]], dtype=np.float32), np.array([1, 0]), 2, c=1.0)
    np.testing.assert_allclose(found.weights_CD, [[-w / 2], [w / 2]], atol=1e-6)
    np.testing.assert_allclose(found.bias_C, 0, atol=1e-6)
    np.testing.assert_allclose(found.logits(np.array([[2]], dtype=np.float32)), [[-w, w]], atol=1e-5)


def made_up() -> tuple[Any, Any]:
    """30 rows of 4 features in 3 classes that overlap; of waves, so that no generator's version matters."""
    place = np.arange(120).reshape(30, 4)
    labels = np.arange(30) % 3
    rows = np.sin(place * 1.7) + 0.8 * np.cos(labels[:, None] + np.arange(4))
    return rows.astype(np.float32), labels.astype(np.int64)


# scikit-learn 1.9.1: LogisticRegression(C=c, tol=1e-12, max_iter=100000).fit(*made_up()); weights, bias less its mean.
SCIKIT_LEARN: dict[float, tuple[list[list[float]], list[float], float]] = {
    0.01: (
        [
            [0.043735, 0.064084, 0.023382, -0.041951],
            [0.01255, -0.010457, -0.023772, -0.015736],
            [-0.056285, -0.053627, 0.00039, 0.057687],
        ],
        [-0.005993, -0.025533, 0.031526],
        0.31900970229228165,
    ),
    1.0: (
        [
            [1.349892, 0.988743, 1.264211, 0.045618],
            [0.094948, -0.930484, -0.435139, -1.031385],
            [-1.44484, -0.058259, -0.829073, 0.985768],
        ],
        [0.346527, -0.56117, 0.214643],
        17.51131744278337,
    ),
    100.0: (
        [
            [4.916015, 3.484521, 5.216335, 1.626931],
            [1.044293, -5.811438, -0.731212, -6.13206],
            [-5.960307, 2.326917, -4.485123, 4.50513],
        ],
        [2.349017, -3.225644, 0.876627],
        163.64749792569165,
    ),
}


@pytest.mark.parametrize("c", SCIKIT_LEARN)
def test_the_optimum_is_that_of_scikit_learn(c: float) -> None:
    rows, labels = made_up()
    weights, bias, least = SCIKIT_LEARN[c]
    found = logistic.fit(rows, labels, 3, c=c)
    # The gradient may be 1e-7 at the end; where c is large the objective is flat, and weights are off by more.
    np.testing.assert_allclose(found.weights_CD, weights, atol=2e-4)
    np.testing.assert_allclose(found.bias_C - found.bias_C.mean(), bias, atol=2e-4)
    logits = found.logits(rows)
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(30), labels]
    assert c * losses.sum() + (found.weights_CD**2).sum() / 2 == pytest.approx(least, rel=1e-8)


def test_a_start_elsewhere_leads_to_the_same_optimum_and_equal_inputs_to_equal_weights() -> None:
    rows, labels = made_up()
    once, again = (logistic.fit(rows, labels, 3, c=1.0) for _ in range(2))
    np.testing.assert_array_equal(once.weights_CD, again.weights_CD)
    elsewhere = logistic.fit(rows, labels, 3, c=1.0, start=logistic.fit(rows, labels, 3, c=100.0))
    np.testing.assert_allclose(elsewhere.weights_CD, once.weights_CD, atol=1e-5)


@pytest.mark.parametrize("c", [0.0, -1.0, float("nan"), float("inf")])
def test_a_strength_that_is_none_is_refused(c: float) -> None:
    with pytest.raises(ConfigError, match="expected a number above 0"):
        logistic.fit(*made_up(), 3, c=c)


# --- the choice of C


def test_the_search_halves_its_steps_around_the_best() -> None:
    best, scores = logistic.choose(lambda exponent: -abs(exponent - 1.3))
    # 2 is the best of the first; then 1 and 3, 0.5 and 1.5, 1.25 and 1.75, 1.125 and 1.375.
    assert sorted(scores) == [-6, -4, -2, 0, 0.5, 1, 1.125, 1.25, 1.375, 1.5, 1.75, 2, 3, 4, 6]
    assert best == 1.25


def test_of_equal_scores_the_stronger_regularisation_is_taken_and_the_range_is_kept() -> None:
    best, scores = logistic.choose(lambda exponent: 1.0)
    assert best == -6
    assert min(scores) == -6
    assert max(logistic.choose(lambda exponent: exponent)[1]) == 6


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(0, 5))
def test_a_fifth_of_each_class_is_held_out_but_never_all(labels: list[int], seed: int) -> None:
    labels_N = np.array(labels, dtype=np.int64)
    is_held_N = logistic.held_out(labels_N, share=0.2, seed=seed)
    for label in set(labels):
        count = labels.count(label)
        expected = 0 if count == 1 else max(1, round(0.2 * count))
        assert is_held_N[labels_N == label].sum() == expected
    np.testing.assert_array_equal(is_held_N, logistic.held_out(labels_N, share=0.2, seed=seed))


# --- shots


@settings(max_examples=25)
@given(st.integers(1, 4), st.integers(0, 3))
def test_shots_are_as_many_of_each_class_each_once(shots: int, seed: int) -> None:
    labels_N = np.array([0, 1, 1, 0, 2, 2, 2, 1, 0, 2, 1, 0], dtype=np.int64)
    drawn = logistic.draw_shots(labels_N, ("a", "b", "c"), shots, seed=seed)
    assert np.bincount(labels_N[drawn]).tolist() == [shots] * 3
    assert len(set(drawn.tolist())) == 3 * shots
    np.testing.assert_array_equal(drawn, logistic.draw_shots(labels_N, ("a", "b", "c"), shots, seed=seed))


def test_a_class_with_fewer_pictures_than_shots_is_named() -> None:
    with pytest.raises(DataError, match="class 'b' has 1 training pictures; --shots 2"):
        logistic.draw_shots(np.array([0, 0, 1]), ("a", "b"), 2, seed=0)


# --- feature files


def save(path: Path, rows: Any, labels: Any, **more: Any) -> Path:
    np.savez(path, features=rows, labels=labels, **more)
    return path


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"features": np.ones((2, 3))}, "expected the arrays features and labels"),
        ({"features": np.ones((2, 3)), "labels": np.array([0])}, r"one label a row, got \(2, 3\) and \(1,\)"),
        ({"features": np.ones(3), "labels": np.array([0, 1, 0])}, "expected features"),
        ({"features": np.ones((0, 3)), "labels": np.zeros(0, int)}, "expected features"),
        ({"features": np.ones((2, 3)), "labels": np.array([0.0, 1.0])}, "labels of integers"),
        ({"features": np.ones((2, 3), int), "labels": np.array([0, 1])}, "features of floats"),
        ({"features": np.ones((2, 3)), "labels": np.array([-1, 1])}, "expected labels from 0 to 1, got -1"),
        ({"features": np.ones((2, 3)), "labels": np.array([0, 2]), "classes": np.array(["a", "b"])}, "from 0 to 1"),
        ({"features": np.array([[1.0], [np.nan]]), "labels": np.array([0, 1])}, "row 2 holds NaN"),
        ({"features": np.array([{}], dtype=object), "labels": np.array([0])}, "cannot be read as npz"),
    ],
)
def test_faulty_feature_files_are_refused(tmp_path: Path, arrays: dict[str, Any], reason: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError, match=rf"x\.npz: .*{reason}"):
        classification.read(tmp_path / "x.npz")


# --- the command


def probe(*arguments: object, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    cli.main(["linear-probe", *map(str, arguments), "--json", "--device", "cpu"])
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_features_by_hand_are_classified_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corners = np.array([[1, 0], [0, 1], [-1, 0]], dtype=np.float32)
    labels = np.arange(30) % 3
    train = save(tmp_path / "train.npz", corners[labels], labels, classes=np.array(["右", "上", "左"]))
    # Named in another order; the second of three pictures of 右 lies where 上 does, so 3 of 4 and (2/3 + 1) / 2.
    rows = np.array([[1, 0], [0.1, 0.9], [0.9, 0.1], [-0.8, 0.1]], dtype=np.float32)
    test = save(tmp_path / "test.npz", rows, np.array([1, 1, 1, 0]), classes=np.array(["左", "右"]))
    result = probe("--train", train, "--test", test, capsys=capsys)
    assert (result["top1"], result["top1_std"]) == (75.0, 0.0)
    assert result["mean_per_class"] == pytest.approx(100 * (2 / 3 + 1) / 2)
    assert (result["num_classes"], result["num_test"], result["embed_dim"]) == (3, 4, 2)
    # All strengths tell the corners apart, so the strongest regularisation is taken.
    assert [(run["seed"], run["c"], run["num_train"]) for run in result["runs"]] == [(0, 1e-6, 30)]


def test_c_is_chosen_on_rows_that_are_held_out_then_all_are_fitted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, labels = made_up()
    train, test = save(tmp_path / "train.npz", rows, labels), save(tmp_path / "test.npz", -rows[:5], labels[:5])
    fit, logits = logistic.fit, logistic.Classifier.logits
    fitted: list[set[tuple[float, ...]]] = []
    scored: list[set[tuple[float, ...]]] = []

    def distinct(rows_ND: Any) -> set[tuple[float, ...]]:
        found = set(map(tuple, rows_ND.tolist()))
        assert len(found) == len(rows_ND)
        return found

    def recorded_fit(rows_ND: Any, *arguments: Any, **settings: Any) -> logistic.Classifier:
        fitted.append(distinct(rows_ND))
        return fit(rows_ND, *arguments, **settings)

    def recorded_logits(self: logistic.Classifier, rows_ND: Any) -> Any:
        scored.append(distinct(rows_ND))
        return logits(self, rows_ND)

    monkeypatch.setattr(logistic, "fit", recorded_fit)
    monkeypatch.setattr(logistic.Classifier, "logits", recorded_logits)
    probe("--train", train, "--test", test, capsys=capsys)
    assert len(fitted) >= len(logistic.FIRST_EXPONENTS) + 1
    for kept, held in zip(fitted[:-1], scored[:-1], strict=True):
        assert (len(kept), len(held)) == (24, 6)
        assert kept | held == distinct(rows)
    assert fitted[-1] == distinct(rows)
    assert scored[-1] == distinct(-rows[:5])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five classes of drawings: `noto/test` to train on, `twemoji/test` by another hand to test on."""
    folder = tmp_path_factory.mktemp("probe")
    few = {label: emoji.CLASSES[label] for label in LABELS}
    emoji.write_classification(folder / "noto", few)
    emoji.write_classification(folder / "twemoji", few, vendor="twemoji")
    return folder


def test_pictures_are_probed_as_their_features_are(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = pictures / "noto" / "test", pictures / "twemoji" / "test"
    folders = ["--train", train, "--test", test, "--model", "Emoji-Tiny", "--num-workers", 0, "--c", 10]
    result = probe(*folders, capsys=capsys)
    encoder, arrays = Encoder("Emoji-Tiny", device="cpu"), {}
    for name, folder in (("train", train), ("test", test)):
        files = sorted(folder.glob("*/*.png"))
        labels = np.array([int(file.parent.name) for file in files])
        arrays[name] = save(tmp_path / f"{name}.npz", encoder.encode_images(files, batch_size=64), labels)
    by_hand = classification.read(arrays["train"])
    kept = classification.read(train.parent / "test.Emoji-Tiny.npz")
    np.testing.assert_allclose(kept.rows_ND, by_hand.rows_ND, atol=1e-6)
    np.testing.assert_array_equal(kept.labels_N, by_hand.labels_N)
    assert kept.classes == ("000", "001", "002", "003", "004")
    same = probe("--train", arrays["train"], "--test", arrays["test"], "--c", 10, capsys=capsys)
    assert same["runs"] == result["runs"]
    assert result["top1"] > 90
    monkeypatch.setattr(TorchBackend, "encode_pixels", None)  # the features are there: nothing is computed
    assert probe(*folders, capsys=capsys) == result


def test_features_of_another_family_are_probed_as_they_are(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    model = f"hf:{write_family(tmp_path / 'family', 'siglip')}"
    train, test = pictures / "noto" / "test", pictures / "twemoji" / "test"
    flags = ["--train", train, "--test", test, "--model", model, "--cache", tmp_path, "--num-workers", 0, "--c", 10]
    result = probe(*flags, capsys=capsys)
    encoder = Encoder(model, device="cpu")
    arrays = {}
    for name, folder in (("train", train), ("test", test)):
        files = sorted(folder.glob("*/*"))
        labels = np.array([int(file.parent.name) for file in files])
        arrays[name] = save(tmp_path / f"{name}.npz", encoder.encode_images(files, batch_size=64), labels)
    assert (
        probe("--train", arrays["train"], "--test", arrays["test"], "--c", 10, capsys=capsys)["runs"] == result["runs"]
    )
    assert result["embed_dim"] == encoder.embed_dim


def test_features_of_another_checkpoint_of_the_same_name_are_computed_again(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, cache = pictures / "twemoji" / "test", tmp_path / "cache"
    cache.mkdir()
    state = load_from_name("Emoji-Tiny")[0].state_dict()
    capsys.readouterr()  # what loading prints
    found, names = [], []
    for name, sign in (("a", 1), ("b", -1)):
        for end in ("weight", "bias"):
            state[f"visual.attnpool.c_proj.{end}"] *= sign
        (tmp_path / name).mkdir()
        torch.save({"state_dict": state}, tmp_path / name / "mine.pt")
        model = ["--checkpoint", tmp_path / name / "mine.pt", "--cache", cache, "--num-workers", 0]
        probe("--train", folder, "--test", folder, *model, "--c", 1, capsys=capsys)
        (file,) = cache.iterdir()
        found.append(classification.read(file).rows_ND)
        names.append(file.name)
    assert names[0] == names[1]
    np.testing.assert_allclose(found[1], -found[0], atol=1e-6)


def test_few_shots_are_drawn_by_seed_and_averaged(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, test = pictures / "noto" / "test", pictures / "twemoji" / "test"
    flags = ["--train", train, "--test", test, "--model", "Emoji-Tiny", "--num-workers", 0, "--shots", 1]
    result = probe(*flags, "--seeds", 0, 1, 2, capsys=capsys)
    assert [(run["seed"], run["num_train"], run["c"]) for run in result["runs"]] == [(s, 5, 0.316) for s in range(3)]
    top1 = [run["top1"] for run in result["runs"]]
    assert result["top1"] == pytest.approx(np.mean(top1))
    assert result["top1_std"] == pytest.approx(np.std(top1))
    assert probe(*flags, "--seeds", 2, capsys=capsys)["runs"] == result["runs"][2:]


def test_features_of_changed_pictures_are_computed_again_and_a_killed_run_goes_on(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "few"
    for number in (0, 1):
        shutil.copytree(pictures / "noto" / "test" / f"{number:03d}", folder / f"{number:03d}")
    encoder = Encoder("Emoji-Tiny", device="cpu")
    sizes = {"batch_size": 4, "num_workers": 0}
    encode, calls = TorchBackend.encode_pixels, []

    def counted(self: TorchBackend, pixels: Any) -> Any:
        calls.append(len(pixels))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, pixels)

    def features() -> classification.ClassFeatures:
        model = {"model": "Emoji-Tiny"}
        return classification.of_folder(
            ClassFolders(folder), tmp_path / "few.npz", encoder, lambda _: model, Speaker(quiet=True), **sizes
        )

    monkeypatch.setattr(TorchBackend, "encode_pixels", counted)
    with pytest.raises(KeyboardInterrupt):
        features()
    assert [path.name for path in tmp_path.glob("few.npz*")] == ["few.npz.partial"]
    found = features()
    num_batches = -(-len(found.rows_ND) // 4)
    assert len(calls) == 1 + num_batches  # the third batch alone was computed twice
    assert "8 rows done" in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("few.npz*")] == ["few.npz"]
    np.testing.assert_array_equal(features().rows_ND, found.rows_ND)
    assert len(calls) == 1 + num_batches
    next(folder.glob("000/*")).unlink()
    assert len(features().rows_ND) == len(found.rows_ND) - 1
    assert "computing again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "reason"),
    [
        (["--test", "two.npz"], 2, "--train: expected a folder"),
        (["--train", "two.npz"], 2, "--test: expected a folder"),
        (["--train", "two.npz", "--test", "two.npz", "--shots", "0"], 2, "--shots: expected at least 1"),
        (["--train", "two.npz", "--test", "two.npz", "--c", "0"], 2, "--c: expected more than 0, got 0"),
        (["--train", "two.npz", "--test", "two.npz", "--seeds", "1", "1"], 2, "--seeds: expected different numbers"),
        (["--train", "two.npz", "--test", "two.npz", "--c", "1", "--seeds", "1", "2"], 2, "--seeds: nothing is drawn"),
        (["--train", "two.npz", "--test", "two.npz", "--context-length", "9"], 2, "--context-length"),
        (["--train", "two.npz", "--test", "two.npz", "--model", "RN50"], 1, "--model: no model is opened"),
        (["--train", "two.npz", "--test", "two.npz", "--cache", "x"], 1, "--cache: no model is opened"),
        (["--train", "two.npz", "--test", "two.npz", "--checkpoint", "x"], 1, "--checkpoint: no model is opened"),
        (["--train", "two.npz", "--test", "two.npz", "--precision", "bf16"], 1, "--precision: no model is opened"),
        (["--train", "none", "--test", "two.npz"], 1, "--train none: no such folder or file"),
        (["--train", "two.npz", "--test", "wide.npz"], 1, "features of 2 numbers, wide.npz of 3; use one model"),
        (["--train", "one.npz", "--test", "two.npz"], 1, "one.npz: expected two classes or more"),
        (["--train", "two.npz", "--test", "other.npz"], 1, "other.npz: the class 'c' is not among those of two.npz"),
        (["--train", "two.npz", "--test", "two.npz", "--shots", "9"], 1, "class 'a' has 2 training pictures"),
        (["--train", "text.npz", "--test", "two.npz"], 1, "text.npz: cannot be read as npz"),
        (["--train", "two.npz", "--test", "empty", "--model", "Emoji-Tiny"], 1, "empty: holds no sub-folder"),
    ],
)
def test_what_cannot_be_probed_is_told_in_one_sentence(
    tmp_path: Path,
    arguments: list[str],
    status: int,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = np.array([[1, 0], [0, 1], [1, 0], [0, 1]], dtype=np.float32)
    ab = np.array(["a", "b"])
    save(Path("two.npz"), rows, np.array([0, 1, 0, 1]), classes=ab)
    save(Path("wide.npz"), np.ones((2, 3), np.float32), np.array([0, 1]), classes=ab)
    save(Path("one.npz"), rows, np.zeros(4, int), classes=ab)
    save(Path("other.npz"), rows, np.array([0, 1, 0, 1]), classes=np.array(["a", "c"]))
    Path("text.npz").write_text("none")
    Path("empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["linear-probe", *arguments])
    assert exit_info.value.code == status
    assert reason in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert sorted(tmp_path.rglob("*")) == before
