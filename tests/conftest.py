"""What all test files share, to be quick: their order, and the shortcuts that are taken unless a test forgoes them."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import shortcuts
import torch
import torch.onnx
from matplotlib.figure import Figure

from cn_clip import language, ranks, zoo
from cn_clip.demo import emoji
from cn_clip.training import curves

# The files that take longest come first: a process that begins one of them last would work alone for a while.
LONGEST = ("docs", "training_resume", "training_state", "tensorrt", "coreml", "serve_command", "faulty_paths", "demo")
LONGEST += ("platforms", "bench", "export_cache", "training_options", "training_command", "distributed", "cli", "page")
LONGEST += ("export", "search_command", "precision", "backends", "extract_features", "extract_backends")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; within a file, and among the others, as they were found."""
    items.sort(key=lambda item: order_of(item.path))


def order_of(path: Path) -> int:
    """The number of a file among the longest; the others are alike."""
    name = path.stem.removeprefix("test_")
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)


@pytest.fixture(scope="session", autouse=True)
def told_in_english() -> Iterator[None]:
    """By this process and those that it starts, on every machine; tests of the other language set it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(language.CHOICE, "en")
        yield


@pytest.fixture(scope="session", autouse=True)
def translations_kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Of all processes of the run; those of pytest-xdist have folders beside each other."""
    base = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "translations"
        patch.setenv(shortcuts.TRANSLATIONS, str(folder))
        patch.setattr(torch.onnx, "export", shortcuts.keeping(torch.onnx.export, folder))
        yield


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests on a GPU multiply float32 in full; commands that ran in this process before them have asked for TF32."""
    if item.get_closest_marker("gpu") and torch.cuda.is_available():
        ranks.set_float32_products(ranks.choose_device("cuda"), is_strict=True)


# PyTorch says so of the first product of a process.
NO_CONTEXT = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_CONTEXT])])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The same test on the CPU, in `make test`, and on a GPU, in `make test-gpu`, there without TF32."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("PyTorch finds no GPU here")
    return ranks.choose_device(request.param)


DRAWING, FILLING, TOWERS = Figure.savefig, curves.fill, zoo.model_config


@pytest.fixture(scope="session", autouse=True)
def pictures_are_blank() -> Iterator[None]:
    """Those of matplotlib."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(shortcuts.BLANK, "1")
        patch.setattr(Figure, "savefig", shortcuts.blank)
        patch.setattr(curves, "fill", shortcuts.undrawn)
        yield


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves are really drawn, in this process and in those that it starts."""
    monkeypatch.delenv(shortcuts.BLANK)
    monkeypatch.setattr(Figure, "savefig", DRAWING)
    monkeypatch.setattr(curves, "fill", FILLING)


@pytest.fixture(scope="session", autouse=True)
def towers_are_small() -> Iterator[None]:
    """Those of the pair that tests train."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(shortcuts.SMALL, "tiny")
        patch.setattr(zoo, "model_config", shortcuts.smaller(TOWERS, "tiny"))
        yield


@pytest.fixture
def full_towers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pair is as large as it is, in this process and in those that it starts."""
    monkeypatch.delenv(shortcuts.SMALL)
    monkeypatch.setattr(zoo, "model_config", TOWERS)


@pytest.fixture
def same_random_state() -> Iterator[None]:
    """Of torch, with one thread: runs in this process seed it, and other tests shall not notice."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def few_drawings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the emoji, for commands that go through all of them in this process."""
    load = emoji.load
    monkeypatch.setattr(emoji, "load", lambda vendor="noto": load(vendor)[::16])


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_disks() -> Iterator[None]:
    """Tests survive no power cut. Of the commands that they start, those that are not of warm_python do wait."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", shortcuts.forgo)
        yield
