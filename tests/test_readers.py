"""Whatever the reader of another package raises on a damaged file is one sentence that names the file."""

import io
import json
import pickle
import re
import shutil
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx_towers import write_tower
from tiny_families import write_family
from tiny_models import tiny_model
from torch import nn

from cn_clip import cli
from cn_clip.clip import Encoder
from cn_clip.clip.backends import onnx_files
from cn_clip.clip.backends.base import TowerFacts
from cn_clip.clip.backends.derived import derive
from cn_clip.clip.backends.onnx_files import metadata
from cn_clip.clip.backends.onnx_runtime import OnnxTower
from cn_clip.clip.backends.parity import Reference
from cn_clip.clip.families import folders, names
from cn_clip.clip.weights.checkpoint import read_checkpoint, read_openai_archive
from cn_clip.data.captions import pictures_from_table
from cn_clip.errors import CheckpointError, CnClipError, DataError, DownloadError, first_sentence, reading
from cn_clip.evaluation import classification
from cn_clip.features.files import read_features
from cn_clip.training.scheduler import build_optimizer, decay_groups, load_optimizer_state, optimizer_state


class PanicException(BaseException):
    """As the one of PyO3, which no `except Exception` catches."""


class TakesTwoError(Exception):
    """As UnicodeDecodeError and others: cannot be made of a message alone."""

    def __init__(self, field: str, cause: str) -> None:
        super().__init__(f"{field}: {cause}")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (KeyError("x"), "f.bin: cannot be read ('x'); copy it again"),
        (RuntimeError("a. b\nc"), "f.bin: cannot be read (a); copy it again"),
        (RuntimeError("f.bin: no"), "f.bin: cannot be read (no); copy it again"),
        (RuntimeError(""), "f.bin: cannot be read (RuntimeError); copy it again"),
        (OSError(5, "Input/output error"), "f.bin: cannot be read (Input/output error); copy it again"),
        (MemoryError(), "f.bin: cannot be read (not enough memory); copy it again"),
        (TakesTwoError("field", "is odd"), "f.bin: cannot be read (field: is odd); copy it again"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "odd"), "f.bin: cannot be read ('utf-8' codec can't decode"),
        (PanicException("index out of bounds"), "f.bin: cannot be read (index out of bounds); copy it again"),
    ],
)
def test_whatever_is_raised_is_one_sentence(error: BaseException, sentence: str) -> None:
    with pytest.raises(DataError) as caught, reading("f.bin", DataError, step="copy it again"):
        raise error
    assert str(caught.value).startswith(sentence)
    assert caught.value.__cause__ is error


def test_errors_of_this_package_and_the_end_of_the_program_pass() -> None:
    for error in (CheckpointError("a sentence"), KeyboardInterrupt(), SystemExit(1)):
        with pytest.raises(type(error)) as caught, reading("f.bin", DataError, step="copy it again"):
            raise error
        assert caught.value is error


def test_what_a_file_really_is_comes_instead_of_what_its_reader_says() -> None:
    look = {"f.bin": "is a web page"}.get
    with (
        pytest.raises(DataError, match=r"^f\.bin: is a web page$"),
        reading("f.bin", DataError, step="copy it again", look=look),
    ):
        raise ValueError("bad magic")
    assert len(first_sentence(RuntimeError("x" * 10_000))) == 300


# --- weights


def archive(path: Path, pickled: bytes, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as stream:
        for name, data in {"data.pkl": pickled, "constants.pkl": b"\x80\x02).", **members}.items():
            stream.writestr(f"a/{name}", data)
    return path


def tensors_of_one_storage(count: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """A pickle of so many tensors over the storage "0" of 256 floats."""

    class Storage:
        pass

    class Rebuilt:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (Storage(), 0, size, stride, False, {})

    class Module:
        def __reduce__(self) -> Any:
            return _Scripted, (), {f"w{number}": Rebuilt() for number in range(count)}

    class Pickler(pickle.Pickler):
        def persistent_id(self, one: object) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", 256) if isinstance(one, Storage) else None

    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump(Module())
    return stream.getvalue().replace(f"c{__name__}\n_Scripted\n".encode(), b"c__torch__.m\nM\n")


class _Scripted:
    pass


@pytest.mark.parametrize(
    ("count", "size", "stride"),
    [(1, (1 << 36,), (0,)), (400, (1 << 20,), (0,)), (1, (1 << 20, 1 << 20), (0, 0))],
    ids=["one tensor", "many", "a square"],
)
def test_a_script_archive_that_asks_for_gigabytes_is_refused_at_once(
    tmp_path: Path, count: int, size: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    path = archive(tmp_path / "a.pt", tensors_of_one_storage(count, size, stride), **{"data/0": bytes(1024)})
    with pytest.raises(
        CheckpointError, match=r"a\.pt: a damaged TorchScript archive \(its tensors would take far more"
    ):
        read_openai_archive(path)


def test_an_honest_script_archive_may_share_a_storage(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.pt", tensors_of_one_storage(3, (16, 16), (16, 1)), **{"data/0": bytes(1024)})
    assert [tuple(value.shape) for value in read_openai_archive(path).values()] == [(16, 16)] * 3


@pytest.mark.parametrize("kind", ["script", "saved"])
def test_weights_packed_to_a_thousandth_are_refused_before_they_are_unpacked(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.pt"
    zeros = bytes(300 << 20)
    if kind == "script":
        archive(path, b"\x80\x02}.", **{"data/0": zeros})
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as stream:
            for name, data in {"data.pkl": b"\x80\x02}.", "version": b"3", "data/0": zeros}.items():
                stream.writestr(f"a/{name}", data)
    del zeros
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"a\.pt: has [\d,]+ bytes and would take [\d,]+ in memory; refused"):
            read_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def test_arrays_packed_to_a_thousandth_are_refused_too(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "f.npz", ids=np.arange(4), features=np.zeros((4, 20 << 20), dtype=np.float32))
    with pytest.raises(DataError, match=r"f\.npz: has [\d,]+ bytes and would take [\d,]+ in memory; refused"):
        read_features(tmp_path / "f.npz", "image_id")


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_weights_that_cannot_be_read_are_a_sentence(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")

    def refused(*_: object, **__: object) -> Any:
        raise PermissionError(13, "Permission denied")

    for place in ("builtins.open", "torch.load", "cn_clip.clip.weights.file_formats.load_file"):
        monkeypatch.setattr(place, refused)
    with pytest.raises(CheckpointError, match=rf"a\.{suffix}: .*\(Permission denied\)"):
        read_checkpoint(path)


# --- folders of other families


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"model_type": ["clip"]}),
        ("config.json", {"model_type": {"a": 1}}),
        ("config.json", {"vision_config": [1]}),
        ("config.json", {"text_config": "x"}),
        ("config.json", {"projection_dim": "wide"}),
        ("config.json", {"logit_scale_init_value": {}}),
        ("preprocessor_config.json", {"size": "large"}),
        ("preprocessor_config.json", {"image_mean": [[0.5], "x"]}),
        ("preprocessor_config.json", {"image_processor_type": 3}),
        ("tokenizer_config.json", {"model_max_length": "long"}),
        ("tokenizer_config.json", {"tokenizer_class": None, "added_tokens_decoder": {"x": 1}}),
    ],
)
def test_a_field_of_another_type_in_a_transformers_folder_is_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, file: str, changes: dict[str, Any]
) -> None:
    source = tmp_path_factory.getbasetemp() / "clip"
    folder = shutil.copytree(source if source.is_dir() else write_family(source, "clip"), tmp_path / "clip")
    content = json.loads((folder / file).read_text(encoding="utf-8"))
    (folder / file).write_text(json.dumps({**content, **changes}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=re.escape(str(folder))):
        Encoder(f"hf:{folder}", device="cpu")


class PinnedHub:
    """A hub that has one repository at two revisions."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(self, repo: str, *, revision: str | None, **_: object) -> str:
        from huggingface_hub.errors import RevisionNotFoundError

        folder = self.root / (revision or "main").replace("/", "-")
        if not folder.is_dir():
            raise RevisionNotFoundError.__new__(RevisionNotFoundError)
        return str(folder)


def test_a_revision_of_the_hub_can_be_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.test/")
    monkeypatch.setattr("huggingface_hub.snapshot_download", PinnedHub(tmp_path))
    for revision in ("main", "v1.0", "refs-pr-3"):
        (tmp_path / revision).mkdir()
        (tmp_path / revision / "model.safetensors").touch()
    found = {
        name: folders.folder_of(names.parse(name)).name
        for name in ("hf:someone/model", "hf:someone/model@v1.0", "hf:someone/model@refs/pr/3")
    }
    assert list(found.values()) == ["main", "v1.0", "refs-pr-3"]
    assert (
        str(names.parse("hf:someone/model@v1.0")) == names.absolute("hf:someone/model@v1.0") == "hf:someone/model@v1.0"
    )
    with pytest.raises(
        DownloadError, match=r"hf:someone/model@v2: https://hub\.test has no revision 'v2' of it; give a"
    ):
        folders.folder_of(names.parse("hf:someone/model@v2"))
    for wrong in ("hf:someone/model@", "hf:someone/model@a@b", "hf:./here@main"):
        with pytest.raises(CheckpointError, match=r"an id of the hub, OWNER/NAME or OWNER/NAME@REVISION"):
            folders.folder_of(names.parse(wrong))


def test_a_local_folder_may_have_the_mark_of_a_revision_in_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model@main").mkdir()
    monkeypatch.chdir(tmp_path)
    assert folders.folder_of(names.parse("hf:model@main")) == Path("model@main")


# --- exported files, tables, training state


@pytest.mark.parametrize("place", ["metadata", "name"])
def test_names_and_metadata_of_an_exported_file_that_are_no_text_are_a_sentence(tmp_path: Path, place: str) -> None:
    facts = TowerFacts(kind="text", embed_dim=4, length=52)
    path = write_tower(tmp_path / "t.onnx", "text", metadata=metadata(facts))
    old = b'{"writer"' if place == "metadata" else b"unnorm_text_features"
    path.write_bytes(path.read_bytes().replace(old, b"\xff\xfe" + old[2:]))
    with pytest.raises(CheckpointError, match=r"t\.onnx: "):
        OnnxTower(path, "text", device="cpu")
    if place == "metadata":
        with pytest.raises(CheckpointError, match=r"t\.onnx: "):
            derive(path, "text", "fp16", tmp_path / "o.onnx", Reference({}, {}))


def not_text(arrow: Any) -> Any:
    return arrow.Array.from_buffers(
        arrow.string(),
        2,
        [None, arrow.py_buffer(np.array([0, 1, 3], dtype=np.int32).tobytes()), arrow.py_buffer(b"a\xff\xfe")],
    )


def test_a_parquet_column_that_is_no_text_is_a_sentence(tmp_path: Path) -> None:
    import pyarrow as arrow
    from pyarrow import parquet

    rows = arrow.array([[1.0, 2.0], [3.0, 4.0]], type=arrow.list_(arrow.float32(), 2))
    table = arrow.table({"image_id": not_text(arrow), "feature": rows, "image": not_text(arrow), "text": ["a", "b"]})
    parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t\.parquet: cannot be read as Parquet \('utf-8' codec"):
        read_features(tmp_path / "t.parquet", "image_id")
    with pytest.raises(DataError, match=r"t\.parquet: cannot be read as Parquet \('utf-8' codec"):
        list(
            pictures_from_table(
                tmp_path / "t.parquet", tmp_path, image_column="image", text_column="text", id_column=None
            )
        )


def small_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(model, lr=0.1, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_optimizer_state_of_another_shape_is_refused_when_it_is_read_not_at_the_next_step() -> None:
    model, optimizer = small_optimizer()
    groups = decay_groups(model)
    state = optimizer_state(optimizer, groups)
    state["state"][0]["exp_avg"] = torch.zeros(7)
    with pytest.raises(ValueError, match=r"exp_avg of the shape \(7,\), expected \(2,\)"):
        load_optimizer_state(optimizer, groups, state)


def test_optimizer_state_of_an_old_pytorch_counts_its_steps_in_integers() -> None:
    model, optimizer = small_optimizer()
    groups = decay_groups(model)
    state = optimizer_state(optimizer, groups)
    for entry in state["state"].values():
        entry["step"] = 5
    load_optimizer_state(optimizer, groups, state)
    assert {float(entry["step"]) for entry in optimizer.state.values()} == {5.0}


def test_converting_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    from safetensors import safe_open

    torch.save({"epoch": 3, "step": 9, "name": "甲", "state_dict": tiny_model().state_dict()}, tmp_path / "a.pt")
    written = set()
    for number in range(6):
        target = tmp_path / f"{number}.safetensors"
        cli.main(["convert", str(tmp_path / "a.pt"), str(target)])
        written.add(target.read_bytes())
    assert len(written) == 1
    with safe_open(target, "pt") as stream:
        about = stream.metadata()
        assert (about["epoch"], about["step"], about["name"]) == ("3", "9", "甲")
        for name, value in tiny_model().state_dict().items():
            torch.testing.assert_close(stream.get_tensor(name), value, rtol=0, atol=0)


def test_a_cut_onnx_file_is_a_sentence(tmp_path: Path) -> None:
    path = write_tower(tmp_path / "t.onnx", "text")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"t\.onnx: is not an ONNX file \(.*\); export the model again"):
        onnx_files.load(path)


@pytest.mark.parametrize("raised", [StopIteration(), KeyError("a"), RecursionError(), OSError(5, "Input/output error")])
@pytest.mark.parametrize("kind", [CheckpointError, DataError])
def test_whatever_a_reader_raises_is_one_sentence(raised: Exception, kind: type[CnClipError]) -> None:
    with pytest.raises(kind, match=r"^x: cannot be read \(.+\); y$"), reading("x", kind, step="y"):
        raise raised


def test_a_label_of_any_size_and_a_tower_that_gives_one_number_are_sentences(tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", features=np.ones((1, 2), np.float32), labels=np.array([2**62]))
    with pytest.raises(DataError, match=r"f\.npz: expected labels from 0 to 999999, got 4611686018427387904"):
        classification.read(tmp_path / "f.npz")
    with pytest.raises(CheckpointError, match=r"x: does not say its size"):
        onnx_files.facts_of(
            "x", "text", inputs={"text": (None, 52)}, outputs={"unnorm_text_features": ()}, metadata=None
        )
