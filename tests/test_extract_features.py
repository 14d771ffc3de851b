"""`extract_features`: the reference's lines, files and order, on a tiny dataset and model, and what it refuses."""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from dataset_files import REPOSITORY, jsonl_line, picture, run_script, tsv_line, write_split
from PIL import Image

from cn_clip import cli, zoo
from cn_clip.clip import tokenizer
from cn_clip.clip.backends.base import checked_rows
from cn_clip.clip.backends.pytorch import TorchBackend
from cn_clip.clip.encoder import Encoder
from cn_clip.clip.model import CLIP
from cn_clip.clip.weights import hub
from cn_clip.data.lmdb_store import LmdbWriter
from cn_clip.eval import extract_features
from cn_clip.features import extraction
from cn_clip.features.files import IdField, read_features
from cn_clip.preprocess import build_lmdb_dataset

CONFIG = zoo.ModelConfig(tiny_models.VIT, replace(tiny_models.TEXT, vocab_size=21128))
# Keys of the LMDB sort as text: "1000" before "33".
PICTURES = {33: (255, 0, 0), 7: (0, 255, 0), 1000: (0, 0, 255), "9-号": (9, 99, 199)}
TEXTS = {5: "一只“红色”的猫", 2: "CAT", "t-1": "", 3: "很长的一句话，" * 20, 40: "狗"}
EXTRACT = "eval/extract_features.py"


def save_tiny(path: Path, *, seed: int = 3) -> CLIP:
    """A tiny model with the tokenizer's vocabulary, saved as training saves it; the model has not seen training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIP.from_config(CONFIG).eval()
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"epoch": 3, "step": 7, "name": "tiny", "state_dict": state, "optimizer": {}}, path)
    return model


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CLIP]:
    folder = tmp_path_factory.mktemp("extract")
    images = [tsv_line(image_id, picture(colour)) for image_id, colour in PICTURES.items()]
    write_split(folder, images, [jsonl_line(text_id, text) for text_id, text in TEXTS.items()], split="valid")
    build_lmdb_dataset.main(["--data_dir", str(folder), "--splits", "valid"])
    return folder, save_tiny(folder / "tiny.pt")


@pytest.fixture
def folder(shared: tuple[Path, CLIP], tmp_path: Path) -> Path:
    """The dataset and the checkpoint, by links, in a folder of the test's own."""
    for name in ("lmdb", "valid_texts.jsonl", "tiny.pt"):
        (tmp_path / name).symlink_to(shared[0] / name)
    return tmp_path


def arguments(folder: Path, *more: str) -> list[str]:
    data = [f"--image-data={folder}/lmdb/valid/imgs", f"--text-data={folder}/valid_texts.jsonl"]
    return [*data, f"--resume={folder}/tiny.pt", "--device=cpu", "--num-workers=0", *more]


def extract(folder: Path, *more: str) -> None:
    extract_features.main(arguments(folder, "--extract-image-feats", "--extract-text-feats", *more))


def written(path: Path, field: str) -> tuple[list[Any], np.ndarray]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(list(record) == [field, "feature"] for record in records)
    return [record[field] for record in records], np.array([record["feature"] for record in records], dtype=np.float32)


def refuses(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    """The exit status and what stderr says, without the frame and line breaks around it."""
    with pytest.raises(SystemExit) as exit_info:
        extract_features.main(args)
    captured = capsys.readouterr().err
    assert "Traceback" not in captured
    return int(str(exit_info.value.code)), " ".join(captured.replace("│", " ").split())


# --- what is written


def test_the_script_prints_the_lines_of_the_reference(folder: Path) -> None:
    flags = ["--extract-image-feats", "--extract-text-feats", "--img-batch-size=3", "--text_batch_size", "2"]
    done = run_script(EXTRACT, *arguments(folder, *flags))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "Params:"
    params = dict(line[2:].split(": ", 1) for line in lines if line.startswith("  "))
    assert list(params) == sorted(params)
    chosen = ("img_batch_size", "text_batch_size", "context_length", "precision", "text_feat_output_path")
    assert [params[name] for name in chosen] == ["3", "2", "52", "amp", "None"]
    assert [line for line in lines[1:] if not line.startswith("  ")] == [
        f"Begin to load model checkpoint from {folder}/tiny.pt.",
        f"=> loaded checkpoint '{folder}/tiny.pt' (epoch 3 @ 7 steps)",
        "Preparing image inference dataset.",
        "Preparing text inference dataset.",
        "Make inference for texts...",
        f"5 text features are stored in {folder}/valid_texts.txt_feat.jsonl",
        "Make inference for images...",
        f"4 image features are stored in {folder}/valid_imgs.img_feat.jsonl",
        "Done!",
    ]


def test_ids_keep_type_and_order_and_features_are_the_models(folder: Path, shared: tuple[Path, CLIP]) -> None:
    extract(folder, "--img-batch-size", "3", "--text-batch-size", "2")
    encoder = Encoder(shared[1])
    image_ids, images = written(folder / "valid_imgs.img_feat.jsonl", "image_id")
    text_ids, texts = written(folder / "valid_texts.txt_feat.jsonl", "text_id")
    assert image_ids == [1000, 33, 7, "9-号"]  # the order of the keys in the LMDB
    assert text_ids == [5, 2, "t-1", 3, 40]  # the order of the file
    expected = encoder.encode_images([picture(PICTURES[image_id]) for image_id in image_ids])
    np.testing.assert_allclose(images, expected, atol=1e-6)
    expected = encoder.encode_texts(list(TEXTS.values()))
    np.testing.assert_allclose(texts, expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(np.concatenate([images, texts]), axis=1), 1, atol=1e-6)
    assert np.abs(texts[0] - texts[4]).max() > 1e-3  # the rows are not all the same


def test_lines_are_spaced_as_the_reference_writes_them(folder: Path) -> None:
    extract(folder)
    for name in ("valid_imgs.img_feat.jsonl", "valid_texts.txt_feat.jsonl"):
        for line in (folder / name).read_text().splitlines():
            assert line == json.dumps(json.loads(line))
    assert (folder / "valid_imgs.img_feat.jsonl").read_text().startswith('{"image_id": 1000, "feature": [')


def test_each_kind_alone_writes_its_file_alone(folder: Path) -> None:
    extract_features.main(arguments(folder, "--extract-text-feats", "--image-data=/nowhere"))
    assert (folder / "valid_texts.txt_feat.jsonl").exists()
    assert not (folder / "valid_imgs.img_feat.jsonl").exists()
    extract_features.main(arguments(folder, "--extract-image-feats", f"--image-feat-output-path={folder}/i.jsonl"))
    assert len((folder / "i.jsonl").read_text().splitlines()) == 4


def test_equal_texts_have_equal_features(folder: Path) -> None:
    path = folder / "twice_texts.jsonl"
    path.write_bytes(b"".join(jsonl_line(number, "猫" * (number % 7) + "Cat"[number % 2 :]) for number in range(42)))
    extract_features.main(arguments(folder, "--extract-text-feats", "--text-batch-size=5", f"--text-data={path}"))
    ids, vectors = written(folder / "twice_texts.txt_feat.jsonl", "text_id")
    assert ids == list(range(42))
    np.testing.assert_array_equal(vectors[:14], vectors[14:28])
    assert len(np.unique(vectors, axis=0)) == 14


@pytest.mark.parametrize(
    ("text_data", "text_features", "image_features"),
    [
        ("d/valid_texts.jsonl", "d/valid_texts.txt_feat.jsonl", "d/valid_imgs.img_feat.jsonl"),
        ("d/queries.jsonl", "d/queries.txt_feat.jsonl", "d/queries.jsonl.img_feat.jsonl"),
    ],
)
def test_default_paths_are_those_of_the_reference(text_data: str, text_features: str, image_features: str) -> None:
    options = extract_features.Options(
        extract_image_feats=True, extract_text_feats=True, text_data=text_data, model="x.pt"
    )
    assert options.output_file("text") == (text_features, "jsonl")
    assert options.output_file("image") == (image_features, "jsonl")


@pytest.mark.parametrize("flags", [["--num-workers=1"], ["--img-batch-size=1", "--text-batch-size=64"]])
def test_workers_and_batch_sizes_do_not_change_the_features(folder: Path, flags: list[str]) -> None:
    extract(folder)
    before = [written(folder / f"valid_{name}", field) for name, field in OUTPUTS.items()]
    extract(folder, *flags)
    for (ids, vectors), (name, field) in zip(before, OUTPUTS.items(), strict=True):
        again_ids, again = written(folder / f"valid_{name}", field)
        assert again_ids == ids
        np.testing.assert_allclose(again, vectors, atol=1e-6)


OUTPUTS: dict[str, IdField] = {"imgs.img_feat.jsonl": "image_id", "texts.txt_feat.jsonl": "text_id"}


def test_bf16_features_are_close_to_those_of_fp32(folder: Path) -> None:
    extract(folder, "--precision=fp32")
    before = {name: written(folder / f"valid_{name}", field)[1] for name, field in OUTPUTS.items()}
    extract(folder, "--precision=bf16")
    for name, field in OUTPUTS.items():
        cosines = (written(folder / f"valid_{name}", field)[1] * before[name]).sum(axis=1)
        assert cosines.min() > 0.999
        assert cosines.max() < 1.001


def test_fast_decoding_is_that_of_the_encoder_and_stays_close(folder: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (300, 200, 3), dtype=np.uint8))
    noise.save(tmp_path / "large.jpg", quality=95)
    with LmdbWriter(tmp_path / "imgs", b"num_images") as writer:
        writer.put(b"1", base64.b64encode((tmp_path / "large.jpg").read_bytes()))
    rows = {}
    for decode in ("exact", "fast"):
        output = tmp_path / f"{decode}.jsonl"
        more = [f"--image-data={tmp_path}/imgs", f"--image-feat-output-path={output}", f"--decode={decode}"]
        extract_features.main(arguments(folder, "--extract-image-feats", *more))
        rows[decode] = written(output, "image_id")[1]
    expected = Encoder(folder / "tiny.pt", device="cpu", decode="fast").encode_images([tmp_path / "large.jpg"])
    np.testing.assert_allclose(rows["fast"], expected, atol=1e-6)
    assert 0 < np.abs(rows["fast"] - rows["exact"]).max() < 0.1


def test_context_length_cuts_the_text(folder: Path, shared: tuple[Path, CLIP]) -> None:
    extract_features.main(arguments(folder, "--extract-text-feats", "--context-length=4"))
    _, texts = written(folder / "valid_texts.txt_feat.jsonl", "text_id")
    np.testing.assert_allclose(texts[3], Encoder(shared[1]).encode_texts("很长")[0], atol=1e-6)


def test_json_prints_one_object_and_nothing_else(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extract(folder, "--json")
    assert json.loads(capsys.readouterr().out) == {
        "num_texts": 5,
        "text_features": f"{folder}/valid_texts.txt_feat.jsonl",
        "num_images": 4,
        "image_features": f"{folder}/valid_imgs.img_feat.jsonl",
    }


def test_cn_clip_features_is_the_same_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["cn-clip"])
    extract(folder)
    before = (folder / "valid_texts.txt_feat.jsonl").read_bytes()
    os.unlink(folder / "valid_texts.txt_feat.jsonl")
    cli.main(["features", *arguments(folder, "--extract-text-feats")])
    assert (folder / "valid_texts.txt_feat.jsonl").read_bytes() == before


@pytest.mark.parametrize("output_format", ["npz", "parquet"])
def test_other_formats_hold_the_same_bits(folder: Path, output_format: str) -> None:
    extract(folder)
    extract(folder, f"--output-format={output_format}")
    for name, field in OUTPUTS.items():
        path = folder / f"valid_{name}"
        expected, found = read_features(path, field), read_features(path.with_suffix(f".{output_format}"), field)
        assert found.ids == expected.ids
        assert found.vectors.tobytes() == expected.vectors.tobytes()


def test_the_suffix_of_an_output_path_is_its_format(folder: Path) -> None:
    extract(folder, f"--image-feat-output-path={folder}/i.npz", f"--text-feat-output-path={folder}/t.parquet")
    assert (folder / "i.npz").read_bytes()[:2] == b"PK"
    assert (folder / "t.parquet").read_bytes()[:4] == b"PAR1"
    assert read_features(folder / "i.npz", "image_id").ids == [1000, 33, 7, "9-号"]


# --- killed and run again


# Runs the command and kills the process when the backend is asked for batch `at` of one of its two methods.
KILLED = """
import os, signal, sys
from cn_clip.clip.backends.pytorch import TorchBackend
from cn_clip.eval import extract_features
from cn_clip.features.files import IdField, read_features
method, at = sys.argv[1], int(sys.argv[2])
encode, calls = getattr(TorchBackend, method), [0]
def dying(self, inputs):
    calls[0] += 1
    if calls[0] == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(self, inputs)
setattr(TorchBackend, method, dying)
extract_features.main(sys.argv[3:])
"""


class Killed:
    """A dataset of its own, and extraction that is killed, in this process or in one of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        texts = [jsonl_line(number, "猫狗鱼"[number % 3] * (number % 11) + "x" * (number % 2)) for number in range(90)]
        (folder / "many_texts.jsonl").write_bytes(b"".join(texts))
        self.flags = ["--extract-image-feats", "--extract-text-feats", f"--text-data={folder}/many_texts.jsonl"]
        self.flags += ["--text-batch-size=4", "--img-batch-size=1"]
        self.outputs = [folder / "many_texts.txt_feat.jsonl", folder / "many_imgs.img_feat.jsonl"]

    def arguments(self, *more: str) -> list[str]:
        return arguments(self.folder, *self.flags, *more)

    def run(self, *more: str) -> list[bytes]:
        extract_features.main(self.arguments(*more))
        return [path.read_bytes() for path in self.outputs]

    def interrupt(self, method: str, at: int, *more: str) -> None:
        """Ends the extraction at a batch, as Ctrl-C does."""
        encode = getattr(TorchBackend, method)
        calls = [0]

        def dying(backend: TorchBackend, inputs: Any) -> Any:
            calls[0] += 1
            if calls[0] == at:
                raise KeyboardInterrupt
            return encode(backend, inputs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TorchBackend, method, dying)
            with pytest.raises(SystemExit, match="130"):
                extract_features.main(self.arguments(*more))


@pytest.fixture
def killed(folder: Path) -> Killed:
    return Killed(folder)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fills up with the sizes of the batches that are computed."""
    sizes: list[int] = []
    for method in ("encode_tokens", "encode_pixels"):
        encode = getattr(TorchBackend, method)

        def counting(backend: TorchBackend, inputs: Any, encode: Any = encode) -> Any:
            sizes.append(len(inputs))
            return encode(backend, inputs)

        monkeypatch.setattr(TorchBackend, method, counting)
    return sizes


@pytest.mark.parametrize(
    ("method", "at", "output", "rows"),
    [("encode_tokens", 7, 0, 24), ("encode_pixels", 4, 1, 3)],
    ids=["texts", "images"],
)
def test_a_killed_extraction_goes_on_and_ends_with_the_same_bytes(
    killed: Killed, method: str, at: int, output: int, rows: int, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    expected = killed.run()
    for path in killed.outputs[output:]:
        path.unlink()
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", KILLED, method, str(at), *killed.arguments()]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not killed.outputs[output].exists()
    partial = Path(f"{killed.outputs[output]}.partial")
    with partial.open("ab") as stream:
        stream.write(b"torn")  # the beginning of a row
    sizes = counted(monkeypatch)
    capsys.readouterr()
    assert killed.run() == expected
    assert f"{partial}: {rows} rows done, continuing at row {rows + 1}" in capsys.readouterr().out
    assert not list(killed.folder.glob("*.partial"))
    # 62 texts, 4 pictures; those of the output that was written before are not computed again.
    assert sizes == ([1] if output == 1 else [*9 * [4], 2, *4 * [1]])


def test_a_batch_of_which_some_rows_are_lost_is_computed_as_a_whole(
    killed: Killed, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = ["--img-batch-size=3"]
    expected = killed.run(*batches)
    killed.interrupt("encode_tokens", 7, *batches)
    cut(killed.outputs[0])
    sizes = counted(monkeypatch)
    killed.interrupt("encode_pixels", 2, *batches)
    assert sizes == [*10 * [4], 2, 3]  # 20 of 62 texts were there
    cut(killed.outputs[1])
    del sizes[:]
    assert killed.run(*batches) == expected
    assert sizes == [3, 1]


def cut(output: Path) -> None:
    """Takes the last row and a byte off what is computed."""
    path = Path(f"{output}.partial")
    os.truncate(path, path.stat().st_size - 4 * 24 - 1)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--text-batch-size=5"], "batch_size"),
        (["--context-length=6"], "context_length"),
        (["--precision=bf16"], "precision"),
        (["--num-threads=1"], "num_threads"),
    ],
)
def test_rows_of_other_settings_are_not_gone_on_with(
    killed: Killed, flags: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    killed.flags.remove("--extract-image-feats")
    killed.outputs.pop()
    threads = torch.get_num_threads()
    expected = killed.run(*flags)
    killed.interrupt("encode_tokens", 3)
    capsys.readouterr()
    assert killed.run(*flags) == expected
    torch.set_num_threads(threads)
    assert f"belongs to another extraction (other {named}); starting from the beginning" in capsys.readouterr().out


def test_rows_of_other_weights_or_other_texts_are_not_gone_on_with(
    killed: Killed, capsys: pytest.CaptureFixture[str]
) -> None:
    killed.interrupt("encode_tokens", 3)
    (killed.folder / "tiny.pt").unlink()
    save_tiny(killed.folder / "tiny.pt", seed=4)
    expected = killed.run()
    assert "(other model)" in capsys.readouterr().out
    assert killed.run() == expected
    killed.interrupt("encode_tokens", 3)
    path = killed.folder / "many_texts.jsonl"
    path.write_bytes(path.read_bytes().replace("鱼".encode(), "鸟".encode(), 1))
    capsys.readouterr()
    assert killed.run() != expected
    assert "(other data)" in capsys.readouterr().out


def test_rows_of_other_pictures_are_not_gone_on_with(killed: Killed, capsys: pytest.CaptureFixture[str]) -> None:
    def build(colour: tuple[int, int, int]) -> None:
        with LmdbWriter(killed.folder / "own", b"num_images") as writer:
            for number in range(3):
                writer.put(str(number).encode(), base64.b64encode(picture((*colour[:2], number))))

    own = f"--image-data={killed.folder}/own"
    build((1, 2, 3))
    killed.interrupt("encode_pixels", 3, own)
    shutil.rmtree(killed.folder / "own")
    build((200, 100, 0))
    capsys.readouterr()
    first = killed.run(own)
    assert "many_imgs.img_feat.jsonl.partial: belongs to another extraction (other data)" in capsys.readouterr().out
    assert killed.run(own) == first


def test_a_wrong_path_does_not_lose_the_rows_computed_before(
    killed: Killed, capsys: pytest.CaptureFixture[str]
) -> None:
    killed.interrupt("encode_tokens", 3)
    assert refuses(capsys, *killed.arguments("--image-feat-output-path=/nowhere/i.jsonl"))[0] == 1
    killed.run()
    assert "8 rows done, continuing at row 9" in capsys.readouterr().out


def test_json_tells_that_it_goes_on_beside_the_object(killed: Killed, capsys: pytest.CaptureFixture[str]) -> None:
    killed.interrupt("encode_tokens", 3)
    capsys.readouterr()
    killed.run("--json")
    captured = capsys.readouterr()
    assert json.loads(captured.out)["num_texts"] == 90
    assert "continuing at row 9" in captured.err


# --- what is refused


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--resume=x.pt"], "--extract-image-feats, --extract-text-feats, or both"),
        (["--extract-text-feats"], "--resume: expected a checkpoint file"),
        (["--extract-text-feats", "--resume=x.pt", "--text-batch-size=0"], "--text-batch-size: expected at least 1"),
        (["--extract-image-feats", "--resume=x.pt", "--img-batch-size=-1"], "--img-batch-size: expected at least 1"),
        (["--extract-text-feats", "--resume=x.pt", "--context-length=2"], "--context-length: expected at least 3"),
        (["--extract-image-feats", "--resume=x.pt", "--num-workers=-1"], "--num-workers: expected at least 0"),
        (["--extract-image-feats", "--resume=x.pt", "--num-threads=0"], "--num-threads: expected at least 1"),
        (
            ["--extract-image-feats", "--resume=x.pt", "--precision=int8"],
            "--precision: the torch backend computes in fp32 or bf16 or fp16 or auto, got 'int8'",
        ),
        (
            ["--extract-image-feats", "--resume=x.pt", "--backend=openvino", "--precision=fp16"],
            "--precision: the openvino backend computes in",
        ),
        (
            ["--extract-image-feats", "--resume=x.pt", "--output-format=npz", "--image-feat-output-path=x.jsonl"],
            "--output-format npz: the suffix of x.jsonl says jsonl",
        ),
        (
            [
                "--extract-image-feats",
                "--extract-text-feats",
                "--resume=x.pt",
                "--image-feat-output-path=x.npz",
                "--text-feat-output-path=x.npz",
            ],
            "both are x.npz",
        ),
        (
            [
                "--extract-image-feats",
                "--extract-text-feats",
                "--resume=x.pt",
                "--image-feat-output-path=x.npz",
                "--text-feat-output-path=./y/../x.npz",
            ],
            "both are x.npz",
        ),
        (["--extract-text-feats", "--resume=x.pt", "--text-feat-output-path="], "expected a path, got an empty one"),
    ],
)
def test_wrong_settings_stop_with_status_2(flags: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, line = refuses(capsys, *flags)
    assert status == 2
    assert reason in line


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        ("--resume=/nowhere/x.pt", "Model /nowhere/x.pt not found"),
        ("--image-data=/nowhere/imgs", "/nowhere/imgs: no LMDB is here"),
        ("--text-data=/nowhere/x_texts.jsonl", "/nowhere/x_texts.jsonl: cannot be opened"),
        ("--text-feat-output-path=/nowhere/out.jsonl", "the folder /nowhere does not exist"),
        ("--vision-model=ViT-B-16", "tiny.pt"),
        ("--image-feat-output-path=/tmp", "/tmp: is a folder"),
        ("--context-length=513", "tiny.pt takes texts of at most 512 tokens; use --context-length 512"),
    ],
)
def test_wrong_paths_stop_with_status_1_and_write_nothing(
    folder: Path, flag: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.iterdir())
    status, line = refuses(capsys, *arguments(folder, "--extract-image-feats", "--extract-text-feats", flag))
    assert status == 1
    assert reason in line
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("name", ["valid_texts.jsonl", "lmdb/valid/imgs/data.mdb", "tiny.pt", "link"])
def test_an_input_is_never_overwritten(
    folder: Path, shared: tuple[Path, CLIP], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "link").symlink_to("valid_texts.jsonl")
    before = (folder / name).read_bytes()
    flags = ["--extract-text-feats", "--output-format=jsonl", f"--text-feat-output-path={folder}/{name}"]
    status, line = refuses(capsys, *arguments(folder, *flags))
    assert status == 1
    assert re.search(rf"--text-feat-output-path {folder}/{name}: would overwrite .*, which it reads", line)
    assert (folder / name).read_bytes() == before


@pytest.mark.parametrize(("kind", "first"), [("text", "text_id 40"), ("image", "image_id '9-号'")])
def test_a_model_that_gives_no_numbers_is_told_with_the_first_id(
    folder: Path, kind: str, first: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    method = "encode_tokens" if kind == "text" else "encode_pixels"
    encode = getattr(TorchBackend, method)

    def faulty(self: TorchBackend, inputs: np.ndarray) -> np.ndarray:
        rows: np.ndarray = encode(self, inputs)
        dog = tokenizer.encode(["狗"], 52)[0][1]
        rows[inputs[:, 1] == dog if kind == "text" else 3] = np.nan
        return checked_rows(rows)  # as every backend does

    monkeypatch.setattr(TorchBackend, method, faulty)
    status, line = refuses(capsys, *arguments(folder, f"--extract-{kind}-feats"))
    assert status == 1
    assert f"{first}: the model gives NaN or infinity; compute in fp32, or with a file exported so" in line
    assert not list(folder.glob("*feat*"))


def test_a_text_id_that_comes_twice_is_told_with_both_lines(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = folder / "twice.jsonl"
    texts.write_text('{"text_id": 7, "text": "a"}\n\n{"text_id": 8, "text": "b"}\n{"text_id": 7, "text": "c"}\n')
    status, line = refuses(capsys, *arguments(folder, "--extract-text-feats", f"--text-data={texts}"))
    assert status == 1
    assert f"{texts}:4 text_id: 7 is already on line 1" in line


def test_other_files_in_a_transformers_folder_do_not_make_another_model(tmp_path: Path) -> None:
    names = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin"]
    for name in [*names, "README.md", "x.jsonl.partial", "vocab.txt"]:
        (tmp_path / name).touch()
    assert [path.name for path in hub.files_of(tmp_path)] == names
    assert hub.files_of(tmp_path / "config.json") == [tmp_path / "config.json"]


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_corrupt_picture_is_named_and_no_file_is_left(
    folder: Path, workers: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with LmdbWriter(folder / "bad", b"num_images") as writer:
        writer.put(b"1", base64.b64encode(picture()))
        writer.put(b"666", base64.b64encode(picture()[:50]))
    before = sorted(folder.iterdir())
    flags = ["--extract-image-feats", f"--image-data={folder}/bad", f"--num-workers={workers}", "--img-batch-size=1"]
    status, line = refuses(capsys, *arguments(folder, *flags))
    assert status == 1
    assert "666" in line
    assert sorted(folder.iterdir()) == before


def test_a_faulty_text_is_named_by_its_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "some_texts.jsonl"
    path.write_bytes(jsonl_line(1) + b'{"text_id": 2}\n')
    status, line = refuses(capsys, *arguments(folder, "--extract-text-feats", f"--text-data={path}"))
    assert (status, f"{path}:2" in line) == (1, True)


@pytest.mark.parametrize("debug", [True, False])
def test_debug_logs_what_is_opened(debug: bool, folder: Path) -> None:
    done = run_script(EXTRACT, *arguments(folder, "--extract-image-feats", *["--debug"] * debug))
    assert done.returncode == 0, done.stderr
    assert ("INFO | The specified LMDB directory contains 4 images." in done.stderr) is debug
    assert "LMDB directory" not in done.stdout


def test_help_of_the_script_names_the_flags_of_the_reference() -> None:
    done = subprocess.run(
        [sys.executable, "cn_clip/eval/extract_features.py", "--help"],
        cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for flag in ("--extract-image-feats", "--image-feat-output-path", "--img-batch-size", "--precision", "--debug"):
        assert flag in done.stdout


def test_a_text_passes_the_files_that_the_architecture_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From reading a line to writing its row; opening the model is not on the way."""
    passed: set[str] = set()

    def note(frame: Any, event: str, _: object) -> None:
        _, inside, name = frame.f_code.co_filename.rpartition("/cn_clip/")
        if event == "call" and inside and frame.f_code.co_name != "<module>":
            passed.add(name)

    def watched(function: Any) -> Any:
        def call(*args: Any, **settings: Any) -> Any:
            sys.setprofile(note)
            try:
                return function(*args, **settings)
            finally:
                sys.setprofile(None)

        return call

    monkeypatch.setattr(extraction, "read_texts", watched(extraction.read_texts))
    monkeypatch.setattr(extraction, "write_rows", watched(extraction.write_rows))
    monkeypatch.setattr(extraction.Texts, "compute", watched(extraction.Texts.compute))
    extract_features.main(arguments(folder, "--extract-text-feats"))
    page = (REPOSITORY / "docs" / "en" / "architecture.md").read_text(encoding="utf-8")
    walk = page[page.index("- **A text, from") : page.index("- **A picture into an index**")]
    named = set(re.findall(r"`([\w/]+\.py)`", walk))
    shown = {"language.py", "progress.py"}  # tell people how far it is
    assert passed - shown == named - {"cli.py", "eval/extract_features.py"}
    assert len(named) == 16  # as the page says
