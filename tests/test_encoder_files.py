"""Where an `Encoder` comes from and goes to: names, the hub, folders, other processes and threads."""

import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_hub import COMMIT, TOKEN, UPLOADS, ModelHub, serving
from PIL import Image
from tiny_families import write_family
from tiny_models import CONFIGS, TEXT, tiny_model

import cn_clip
from cn_clip.clip import Encoder, load_from_name
from cn_clip.clip.families.opening import full_name, open_parts
from cn_clip.clip.model import CLIP
from cn_clip.clip.weights import hub
from cn_clip.clip.weights.forms import write_transformers
from cn_clip.errors import CheckpointError, ConfigError, DataError, DownloadError

TEXTS = ["一只猫", "狗", "下雨天的太阳" * 5]
PICTURES = [Image.fromarray(np.random.default_rng(n).integers(0, 255, (40, 30, 3), dtype=np.uint8)) for n in range(9)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Chinese-CLIP as a transformers folder, with the whole vocabulary."""
    config = replace(CONFIGS["vit"], text=replace(TEXT, vocab_size=21128, text_initializer_range=0.3))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = CLIP.from_config(config)
    path = tmp_path_factory.mktemp("models") / "chinese_clip"
    path.mkdir()
    write_transformers(path, model.state_dict(), config)
    return path


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    with serving(monkeypatch, tmp_path / "cache") as server:
        yield server


# --- what it says of itself


def test_the_package_hands_out_the_encoder_and_stays_light() -> None:
    assert cn_clip.Encoder is Encoder
    assert {"Encoder", "__version__"} <= set(dir(cn_clip))
    with pytest.raises(AttributeError, match="module 'cn_clip' has no attribute 'Encode'"):
        cn_clip.Encode  # type: ignore[attr-defined]  # noqa: B018
    code = "import sys, cn_clip; print(sorted({'torch', 'numpy', 'PIL', 'tqdm'} & set(sys.modules)))"
    env = {**os.environ, "PYTHONPATH": str(Path(cn_clip.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout == "[]\n"


def test_its_repr_names_model_backend_precision_device_and_dimensions() -> None:
    encoder = Encoder("Emoji-Tiny", device="cpu")
    assert repr(encoder) == (
        "Encoder('Emoji-Tiny', backend='torch', precision='fp32', device='cpu', dimensions=256, context_length=52)"
    )
    assert (encoder.model_name, encoder.backend_name, encoder.device) == ("Emoji-Tiny", "torch", "cpu")
    assert encoder.dimensions == encoder.embed_dim == encoder.encode_texts("狗").shape[1]
    assert encoder.logit_scale == pytest.approx(load_from_name("Emoji-Tiny", device="cpu")[0].logit_scale.exp().item())
    in_memory = Encoder(tiny_model(), device="cpu")
    assert in_memory.model_name is None
    assert repr(in_memory).startswith("Encoder(a model in memory, backend='torch', precision='fp32', device='cpu', ")


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_the_device_of_exported_files_is_the_cpu(backend: Any, tmp_path: Path) -> None:
    encoder = Encoder("Emoji-Tiny", backend=backend, download_root=tmp_path)
    assert (encoder.device, encoder.backend_name) == ("cpu", backend)
    tensor = encoder.encode_texts(TEXTS, output="torch")
    np.testing.assert_array_equal(tensor.numpy(), encoder.encode_texts(TEXTS))


# --- names


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("vit-b-16", "ViT-B-16"),
        ("ViT-B/16", "ViT-B-16"),
        ("ViT_L_14@336", "ViT-L-14-336"),
        ("emoji_tiny", "Emoji-Tiny"),
    ],
)
def test_a_name_that_there_is_not_brings_the_one_that_was_meant(name: str, meant: str) -> None:
    with pytest.raises(CheckpointError, match=rf"Model {name} not found; .* did you mean '{meant}'\?$"):
        Encoder(name, device="cpu")


def test_other_names_have_their_nearest_too() -> None:
    with pytest.raises(ConfigError, match=r"backend: expected one of .*, got 'openvinno'; did you mean 'openvino'\?"):
        Encoder("Emoji-Tiny", backend="openvinno")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"or give a file$"):
        Encoder("zzzzzzzzzz", device="cpu")


def test_what_may_be_an_id_of_the_hub_and_what_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    ids = ["OFA-Sys/chinese-clip-vit-base-patch16", "someone/m.v2@main", "someone/m@refs/pr/3"]
    assert all(hub.is_hub_name(name) for name in ids)
    paths = [
        "models/mine",
        "runs/epoch3.pt",
        "a/b/c",
        "./a/b",
        "/a/b",
        "ViT-B/16",
        "ViT-B-16",
        "a",
        Path("a/b"),
        "a@b/c",
    ]
    assert not any(hub.is_hub_name(name) for name in paths)
    assert full_name("someone/model") == "someone/model"
    assert full_name("models/mine") == str(tmp_path / "models" / "mine")


# --- the hub


def test_an_id_of_the_hub_opens_its_model(server: ModelHub, folder: Path) -> None:
    server.put("OFA-Sys/chinese-clip-vit-base-patch16", folder)
    expected = Encoder(folder, device="cpu").encode_texts(TEXTS)
    for name in ("OFA-Sys/chinese-clip-vit-base-patch16", "OFA-Sys/chinese-clip-vit-base-patch16@main"):
        encoder = Encoder(name, device="cpu")
        assert (encoder.model_name, encoder.context_length) == (name, 52)
        np.testing.assert_array_equal(encoder.encode_texts(TEXTS), expected)
    model, _ = load_from_name("OFA-Sys/chinese-clip-vit-base-patch16", device="cpu")
    assert model.config.vision.embed_dim == encoder.dimensions


def test_an_id_of_another_family_opens_it_as_it_prepares_its_inputs(server: ModelHub, tmp_path: Path) -> None:
    siglip = write_family(tmp_path / "siglip", "siglip")
    server.put("google/siglip", siglip)
    expected = Encoder(open_parts(f"hf:{siglip}", device="cpu")).encode_texts(TEXTS)
    for model in ("google/siglip", siglip, str(siglip)):  # a folder of another family needs no hf: either
        np.testing.assert_array_equal(Encoder(model, device="cpu").encode_texts(TEXTS), expected)
    with pytest.raises(ConfigError, match="runs in torch or onnx or openvino, got 'tensorrt'"):
        Encoder("google/siglip", backend="tensorrt")


def test_what_the_hub_does_not_have_is_one_sentence_with_the_next_step(server: ModelHub, folder: Path) -> None:
    server.put("someone/public", folder)
    server.private, server.gated = {"someone/private"}, {"someone/gated"}
    for name, words in (
        (
            "OFA-Sys/chinese-clip-vit-b-16",
            r": no such folder here, and no such model at http://127\.0\.0\.1:\d+; check the spelling, or, if it is "
            r"private, log in with `hf auth login`; did you mean 'OFA-Sys/chinese-clip-.*'\?$",
        ),
        ("someone/nothing", "; check the spelling, or, if it is private, log in with `hf auth login`$"),
        ("someone/private", "; check the spelling, or, if it is private, log in"),
        ("someone/gated", r" gives it to those who asked; ask at http://.*/someone/gated, then `hf auth login`$"),
        ("someone/public@v9", r" has no revision 'v9' of it; give a branch, a tag or a whole commit"),
    ):
        with pytest.raises(DownloadError, match=words) as caught:
            Encoder(name, device="cpu")
        assert str(caught.value).startswith(f"{name}: ")
        assert "\n" not in str(caught.value)


def test_a_hub_that_is_not_there_is_a_sentence(server: ModelHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match=r"someone/model: no such folder here, and it could not be downloaded from"):
        Encoder("someone/model", device="cpu")


# --- folders and files


def test_a_saved_folder_opens_here_and_in_transformers(folder: Path, tmp_path: Path) -> None:
    import transformers

    encoder = Encoder(folder, device="cpu")
    assert encoder.save(tmp_path / "saved") == tmp_path / "saved"
    again = Encoder(tmp_path / "saved", device="cpu")
    np.testing.assert_array_equal(again.encode_texts(TEXTS), encoder.encode_texts(TEXTS))
    np.testing.assert_array_equal(again.encode_images(PICTURES), encoder.encode_images(PICTURES))
    model = transformers.ChineseCLIPModel.from_pretrained(tmp_path / "saved").eval()
    processor = transformers.ChineseCLIPProcessor.from_pretrained(tmp_path / "saved", backend="pil")
    with torch.inference_mode():
        found = model.get_image_features(**processor(images=PICTURES, return_tensors="pt"))
    features = getattr(found, "pooler_output", found)
    assert (torch.nn.functional.normalize(features).numpy() * encoder.encode_images(PICTURES)).sum(1).min() > 0.9999


def test_a_model_in_memory_is_saved_as_it_is_now(folder: Path, tmp_path: Path) -> None:
    model, _ = load_from_name(str(folder), device="cpu")
    encoder = Encoder(model, device="cpu")
    with torch.no_grad():
        model.text_projection += 0.1 * torch.randn(
            model.text_projection.shape, generator=torch.Generator().manual_seed(0)
        )
    encoder.save(tmp_path / "trained")
    rows = Encoder(tmp_path / "trained", device="cpu").encode_texts(TEXTS)
    np.testing.assert_array_equal(rows, encoder.encode_texts(TEXTS))
    assert np.abs(rows - Encoder(folder, device="cpu").encode_texts(TEXTS)).max() > 0.01


def test_the_weights_that_are_saved_are_not_rounded(folder: Path, tmp_path: Path) -> None:
    Encoder(folder, device="cpu", precision="bf16").save(tmp_path / "saved")
    np.testing.assert_array_equal(
        Encoder(tmp_path / "saved", device="cpu").encode_texts(TEXTS), Encoder(folder, device="cpu").encode_texts(TEXTS)
    )
    model, _ = load_from_name(str(folder), device="cpu")
    with pytest.raises(ConfigError, match="the weights in memory are rounded to bf16; save an Encoder of the model in"):
        Encoder(model, device="cpu", precision="bf16").save(tmp_path / "rounded")


@pytest.mark.parametrize("name", ["emoji.safetensors", "emoji.pt"])
def test_a_resnet_is_saved_as_a_file_and_a_folder_refuses_it(name: str, tmp_path: Path) -> None:
    encoder = Encoder("Emoji-Tiny", device="cpu")
    encoder.save(tmp_path / name)
    np.testing.assert_array_equal(
        Encoder(tmp_path / name, device="cpu").encode_texts(TEXTS), encoder.encode_texts(TEXTS)
    )
    with pytest.raises(ConfigError, match=r"; a \.pt or \.safetensors can hold it"):
        encoder.save(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_model_of_another_family_is_copied(tmp_path: Path) -> None:
    siglip = write_family(tmp_path / "siglip", "siglip")
    encoder = Encoder(siglip, device="cpu")
    encoder.save(tmp_path / "saved")
    np.testing.assert_array_equal(
        Encoder(tmp_path / "saved", device="cpu").encode_images(PICTURES), encoder.encode_images(PICTURES)
    )
    with pytest.raises(ConfigError, match=r"saved as a folder; give a name without \.pt"):
        encoder.save(tmp_path / "a.pt")


def test_nothing_is_written_over_unless_asked(folder: Path, tmp_path: Path) -> None:
    encoder = Encoder(folder, device="cpu")
    encoder.save(tmp_path / "saved")
    with pytest.raises(DataError, match="saved: exists; give overwrite=True, or another path"):
        encoder.save(tmp_path / "saved")
    encoder.save(tmp_path / "saved", overwrite=True)
    (tmp_path / "saved" / "mine.txt").touch()
    with pytest.raises(DataError, match=r"saved: holds other things \(mine\.txt\); choose a new folder"):
        encoder.save(tmp_path / "saved", overwrite=True)
    with pytest.raises(ConfigError, match="path: expected a file or a folder, got an empty path"):
        encoder.save("")


def test_what_has_no_weights_to_save_is_refused(tmp_path: Path) -> None:
    from test_encoder import FixedBackend

    with pytest.raises(ConfigError, match="only Chinese-CLIP can be saved, and models opened by name"):
        Encoder(FixedBackend()).save(tmp_path / "x")
    Encoder("Emoji-Tiny", backend="onnx", download_root=tmp_path).save(tmp_path / "x.pt")  # its weights are known
    (prefix,) = {str(path).partition(".img.")[0] for path in (tmp_path / "exported").rglob("*.img.fp32.onnx")}
    with pytest.raises(ConfigError, match="exported files cannot be saved as a model; open the checkpoint"):
        Encoder(prefix, backend="onnx").save(tmp_path / "y.pt")


# --- to the hub


@UPLOADS
def test_what_is_pushed_is_opened_by_its_id(server: ModelHub, folder: Path) -> None:
    encoder = Encoder(folder, device="cpu")
    address = encoder.push_to_hub("someone/mine", token=TOKEN, message="第一版")
    assert address == f"{server.endpoint}/someone/mine/commit/{COMMIT}"
    assert server.messages == ["第一版"]
    files = server.repos["someone/mine"]
    assert {"config.json", "model.safetensors", "modules.json", "vocab.txt", "README.md"} <= files.keys()
    assert 'Encoder("someone/mine")' in files["README.md"].decode()
    np.testing.assert_array_equal(
        Encoder("someone/mine", device="cpu").encode_texts(TEXTS), encoder.encode_texts(TEXTS)
    )


@UPLOADS
def test_a_readme_that_is_there_is_kept_and_a_branch_is_made(server: ModelHub, folder: Path) -> None:
    server.repos["someone/mine"] = {"README.md": b"mine"}
    Encoder(folder, device="cpu").push_to_hub("someone/mine", token=TOKEN)
    assert server.repos["someone/mine"]["README.md"] == b"mine"
    Encoder(folder, device="cpu").push_to_hub("someone/mine", token=TOKEN, revision="v2")
    assert server.branches == ["v2"]


@UPLOADS
def test_a_hub_that_does_not_take_it_says_what_to_do(server: ModelHub, folder: Path) -> None:
    encoder = Encoder(folder, device="cpu")
    with pytest.raises(DownloadError, match=r"does not let you write there; `hf auth login` with a token that may"):
        encoder.push_to_hub("someone/mine", token="hf_wrong")
    for repo in ("a/b/c", "", "me/x@main"):
        with pytest.raises(ConfigError, match="repo: expected OWNER/NAME, got"):
            encoder.push_to_hub(repo, token=TOKEN)


# --- other processes


BACKENDS: list[dict[str, Any]] = [{"backend": "torch"}, {"backend": "onnx"}, {"backend": "openvino"}]


@pytest.mark.parametrize("settings", BACKENDS, ids=lambda one: one["backend"])
def test_a_pickled_encoder_is_opened_again_with_its_settings(settings: dict[str, Any], tmp_path: Path) -> None:
    encoder = Encoder("Emoji-Tiny", **settings, download_root=tmp_path, context_length=9, decode="fast", upright=True)
    again = pickle.loads(pickle.dumps(encoder))
    assert repr(again) == repr(encoder)
    assert (again.context_length, again.decode, again.upright) == (9, "fast", True)
    np.testing.assert_array_equal(again.encode_texts(TEXTS), encoder.encode_texts(TEXTS))
    assert len(pickle.dumps(encoder)) < 2000


def _rows_of(encoder: Encoder, texts: list[str]) -> Any:
    return os.getpid(), encoder.encode_texts(texts)


@pytest.mark.parametrize("settings", BACKENDS, ids=lambda one: one["backend"])
def test_a_pool_of_spawned_processes_takes_it(settings: dict[str, Any], tmp_path: Path) -> None:
    encoder = Encoder("Emoji-Tiny", **settings, download_root=tmp_path, num_threads=1)
    expected = encoder.encode_texts(TEXTS)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pid, rows = pool.submit(_rows_of, encoder, TEXTS).result()
    assert pid != os.getpid()
    np.testing.assert_array_equal(rows, expected)


def test_a_relative_path_is_found_from_another_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    encoder = Encoder(folder.name, device="cpu")
    pickled = pickle.dumps(encoder)
    monkeypatch.chdir(tmp_path)
    again = pickle.loads(pickled)
    assert again.model_name == "chinese_clip"
    np.testing.assert_array_equal(again.encode_texts(TEXTS), encoder.encode_texts(TEXTS))
    assert pickle.loads(pickle.dumps(again)).opened == encoder.opened


def test_an_encoder_of_a_model_in_memory_is_not_pickled_and_says_what_to_do() -> None:
    from test_encoder import FixedBackend

    for encoder in (Encoder(tiny_model(), device="cpu"), Encoder(FixedBackend())):
        with pytest.raises(ConfigError, match=re.escape('(encoder.save("my-model")), and pickle Encoder("my-m')):
            pickle.dumps(encoder)


# --- threads


@pytest.mark.parametrize("settings", BACKENDS, ids=lambda one: one["backend"])
def test_eight_threads_get_the_rows_of_one(settings: dict[str, Any], tmp_path: Path) -> None:
    encoder = Encoder("Emoji-Tiny", **settings, download_root=tmp_path, num_threads=2)
    texts = ["猫" * (number % 9 + 1) for number in range(40)]
    expected = encoder.encode_texts(texts, batch_size=8), encoder.encode_images(PICTURES, batch_size=4)
    start = threading.Barrier(8)

    def work(_: int) -> tuple[Any, Any]:
        start.wait()
        rows = [(encoder.encode_texts(texts, batch_size=8), encoder.encode_images(PICTURES, batch_size=4))] * 3
        return rows[-1]

    with ThreadPoolExecutor(8) as pool:
        for texts_ND, images_ND in pool.map(work, range(8)):
            np.testing.assert_array_equal(texts_ND, expected[0])
            np.testing.assert_array_equal(images_ND, expected[1])


def test_eight_threads_may_be_the_first_to_use_it() -> None:
    encoder = Encoder("Emoji-Tiny", device="cpu")
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(lambda _: encoder.encode_texts(TEXTS), range(8)))
    assert all(np.array_equal(rows[0], one) for one in rows)
