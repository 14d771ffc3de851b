"""Programs that evaluate with Chinese-CLIP's own functions: datasets and loaders, recall, zero-shot, templates."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dataset_files import GOLDEN_LMDB
from deterministic import SMALL_MODEL, picture_bytes, state_dict
from PIL import Image

from cn_clip.clip import image_transform
from cn_clip.clip.model import CLIP
from cn_clip.clip.templates import load_templates
from cn_clip.data.lmdb_store import ImageStore, LmdbWriter
from cn_clip.data.records import NUM_IMAGES_KEY
from cn_clip.errors import DataError
from cn_clip.eval import (
    cvinw_zeroshot_templates,
    data,
    evaluation,
    evaluation_tr,
    extract_features,
    imagenet_zeroshot_templates,
    zeroshot_evaluation,
)
from cn_clip.evaluation import zeroshot

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def faces() -> Any:
    return np.load(GOLDEN / "faces.npz")


@pytest.fixture(scope="module")
def model() -> CLIP:
    model = CLIP(**SMALL_MODEL)
    shapes = [(name, tuple(value.shape)) for name, value in model.state_dict().items()]
    model.load_state_dict({name: torch.from_numpy(value) for name, value in state_dict(shapes).items()})
    return model.float().eval()


# --- datasets and loaders


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures and texts of the golden split that have numbers, which are all that Chinese-CLIP evaluates."""
    folder = tmp_path_factory.mktemp("numbered")
    stored = ImageStore(GOLDEN_LMDB / "lmdb" / "train" / "imgs")
    with LmdbWriter(folder / "imgs", NUM_IMAGES_KEY) as writer:
        for image_id in stored.ids:
            if isinstance(image_id, int):
                writer.put(str(image_id).encode(), stored.base64(image_id) or b"")
    lines = (GOLDEN_LMDB / "train_texts.jsonl").read_text("utf-8").splitlines()
    kept = [line for line in lines if isinstance(json.loads(line)["text_id"], int)]
    (folder / "texts.jsonl").write_text("\n".join(kept), "utf-8")
    return folder


def test_loaders_give_the_batches_of_the_reference(numbered: Path, faces: Any) -> None:
    args = SimpleNamespace(image_data=str(numbered / "imgs"), text_data=str(numbered / "texts.jsonl"))
    args.vision_model, args.img_batch_size, args.text_batch_size = "ViT-B-16", 3, 3
    images, texts = data.get_eval_img_dataset(args), data.get_eval_txt_dataset(args, max_txt_length=9)
    for info in (images, texts):
        assert (info.dataloader.num_samples, info.dataloader.num_batches) == (3, 1)
        assert list(info.sampler or ()) == [0, 1, 2]
    ((image_ids, pixels),) = images.dataloader
    ((text_ids, tokens),) = texts.dataloader
    assert image_ids.tolist() == faces["image_ids"].tolist()
    assert pixels.shape == (3, 3, 224, 224)
    np.testing.assert_allclose(pixels.mean(dim=(2, 3)).numpy(), faces["image_means"], atol=1e-6)
    assert text_ids.tolist() == faces["text_ids"].tolist()
    np.testing.assert_array_equal(tokens.numpy(), faces["text_tokens"])


def test_items_by_number_and_ids_as_strings() -> None:
    pictures = data.EvalImgDataset(str(GOLDEN_LMDB / "lmdb" / "train" / "imgs"), resolution=8)
    assert [pictures[number][0] for number in (2, 0, 1, 3)] == [9, 10, 100, "a-7"]
    assert (len(pictures), pictures.number_images, pictures[0][1].shape) == (4, 4, (3, 8, 8))
    texts = data.EvalTxtDataset(str(GOLDEN_LMDB / "train_texts.jsonl"))
    assert texts.texts[1] == (2, "“浅黄”的 Block")
    assert texts[2][0] == "t-3"
    assert texts[2][1].shape == (24,)


def test_missing_files_are_assertion_errors(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no such file"):
        data.EvalTxtDataset(str(tmp_path / "none.jsonl"))
    with pytest.raises(AssertionError, match="no such folder"):
        data.EvalImgDataset(str(tmp_path / "none"))


@pytest.fixture
def class_folders(tmp_path: Path) -> Path:
    for number in range(6):
        place = tmp_path / f"00{number % 3}"
        place.mkdir(exist_ok=True)
        Image.fromarray(picture_bytes(number)).save(place / f"{number}.png")
    return tmp_path


def test_class_folders_have_what_torchvision_has(class_folders: Path) -> None:
    args = SimpleNamespace(datapath=str(class_folders), img_batch_size=4, num_workers=0)
    info = data.get_zeroshot_dataset(args, image_transform(32))
    dataset = info.dataloader.dataset
    assert info.sampler is None
    assert dataset.classes == ["000", "001", "002"]
    assert dataset.class_to_idx == {"000": 0, "001": 1, "002": 2}
    assert dataset.targets == [0, 0, 1, 1, 2, 2]
    assert dataset.samples == dataset.imgs
    assert dataset.samples[1] == (str(class_folders / "000" / "3.png"), 0)
    assert [images.shape for images, _ in info.dataloader] == [(4, 3, 32, 32), (2, 3, 32, 32)]
    assert data.ClassFolderDataset(str(class_folders))[5][0].mode == "RGB"


# --- zero-shot


TEMPLATES = [lambda c: f"{c}的照片", lambda c: f"“{c}”"]


def test_classifier_and_probabilities_are_those_of_the_reference(
    model: CLIP, class_folders: Path, faces: Any, tmp_path: Path
) -> None:
    args = SimpleNamespace(
        context_length=12, gpu="cpu", datapath=str(class_folders), img_batch_size=4, num_workers=0, index=""
    )
    classifier = zeroshot_evaluation.zero_shot_classifier(model, ["猫", "狗", "鸟"], TEMPLATES, args)
    np.testing.assert_allclose(classifier.numpy(), faces["classifier"], atol=1e-5)  # float32 sums in another order
    loader = data.get_zeroshot_dataset(args, image_transform(32)).dataloader
    top1, probabilities = zeroshot_evaluation.run(model, classifier, loader, args)
    np.testing.assert_allclose(probabilities.numpy(), faces["probabilities"], atol=1e-4)
    assert top1 == zeroshot.accuracy(faces["probabilities"], np.array([0, 0, 1, 1, 2, 2])).top1
    args.index = str(tmp_path / "index.json")
    Path(args.index).write_text("[5, 4, 3, 2, 1, 0]")
    same, turned = zeroshot_evaluation.run(model, classifier, loader, args)
    assert same == top1
    assert torch.equal(turned, probabilities.flip(0))
    Path(args.index).write_text("[0]")
    with pytest.raises(DataError, match="expected each of the numbers of 6 pictures once"):
        zeroshot_evaluation.run(model, classifier, loader, args)


def test_accuracy_counts_the_rows_whose_class_is_among_the_largest() -> None:
    output = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]])
    target = torch.tensor([1, 1, 0])
    assert zeroshot_evaluation.accuracy(output, target) == [1.0]
    assert zeroshot_evaluation.accuracy(output, target, topk=(1, 2, 3)) == [1.0, 2.0, 3.0]


def test_templates_are_functions_and_begin_with_those_of_the_command() -> None:
    for name, dataset in (("openai", "imagenet"), ("food", "food-101"), ("country211", "country211")):
        functions = getattr(cvinw_zeroshot_templates, f"{name}_templates")
        texts = [template.replace("{}", "猫") for template in load_templates(dataset)]
        assert [function("猫") for function in functions][: len(texts)] == texts[: len(functions)]
    for name, functions in vars(cvinw_zeroshot_templates).items():
        if name.endswith("_templates") and isinstance(functions, list):
            assert len({function("{c}") for function in functions}) == len(functions), name
    assert zeroshot_evaluation.openai_templates is cvinw_zeroshot_templates.openai_templates


def test_imagenet_has_a_name_of_its_own_for_each_class_in_the_order_of_the_numbers() -> None:
    names = imagenet_zeroshot_templates.imagenet_classnames
    assert len(names) == len(set(names)) == 1000
    known = {
        0: "丁鱥",
        1: "金鱼",
        207: "金毛犬",
        281: "狸花猫",
        388: "大熊猫",
        574: "高尔夫球",
        817: "跑车",
        999: "卫生纸",
    }
    assert {number: names[number] for number in known} == known
    texts = [template(names[1]) for template in imagenet_zeroshot_templates.openai_imagenet_template]
    assert all("金鱼" in text for text in texts)


def test_names_of_other_modules_are_those_of_their_homes() -> None:
    assert extract_features.get_eval_img_dataset is data.get_eval_img_dataset
    assert extract_features.CLIP is zeroshot_evaluation.CLIP is CLIP
    assert zeroshot_evaluation._preprocess_text("“A”") == '"a"'


# --- recall


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("module", "query", "found"), [(evaluation, "text_id", "image_ids"), (evaluation_tr, "image_id", "text_ids")]
)
def test_scores_of_a_small_case(module: Any, query: str, found: str, tmp_path: Path) -> None:
    golden = write(
        tmp_path / "golden.jsonl", [{query: 1, found: [5]}, {query: 2, found: [20, 3]}, {query: 3, found: [9]}]
    )
    ten = list(range(10))
    predicted = [
        {query: 1, found: [5, *(one for one in ten if one != 5)]},  # first
        {query: 2, found: ten},  # fourth
        {query: 3, found: [*range(10, 19), 9]},  # tenth
    ]
    submitted = write(tmp_path / "predicted.jsonl", predicted)
    # R@1 1/3, R@5 2/3, R@10 3/3, and their mean 2/3
    assert module.compute_score(golden, submitted) == pytest.approx([200 / 3, 100 / 3, 200 / 3, 100])
    assert module.compute_score(golden_file=golden, predict_file=submitted)[3] == 100
    reference = module.read_reference(golden)
    assert reference == {1: [5], 2: [20, 3], 3: [9]}
    assert module.read_submission(submitted, reference, 10)[2] == ten
    with pytest.raises(Exception, match=r"wrong number of predicted .*! Require 5, but 10 founded"):
        module.read_submission(submitted, reference)
    with pytest.raises(Exception, match="The submission file is not found!"):
        module.read_submission(str(tmp_path / "none"), reference, k=10)
    for read in (module.read_reference, lambda path: module.compute_score(path, submitted)):
        with pytest.raises(FileNotFoundError, match="none"):
            read(str(tmp_path / "none"))
    (tmp_path / "golden.jsonl").write_text("{")
    with pytest.raises(ValueError, match="golden"):
        module.read_reference(golden)


def test_scores_of_the_golden_files_are_those_of_the_reference() -> None:
    folder = GOLDEN / "eval"
    for module, name, result in ((evaluation, "", "result.json"), (evaluation_tr, "tr_", "tr_result.json")):
        annotation = folder / f"valid_texts{'.tr' if name else ''}.jsonl"
        scores = json.loads((folder / result).read_text())["scoreJson"]
        found = module.compute_score(str(annotation), str(folder / f"valid_{name}predictions.jsonl"))
        assert found == [scores[key] for key in ("mean_recall", "r1", "r5", "r10")]


@pytest.mark.parametrize("module", [evaluation, evaluation_tr])
def test_reports_are_the_json_of_the_commands(module: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "out.json")
    module.report_score(0.25, 0.5, 0.75, path)
    assert json.loads(Path(path).read_text()) == {
        "success": True,
        "score": 50.0,
        "scoreJson": {"score": 50.0, "mean_recall": 50.0, "r1": 25.0, "r5": 50.0, "r10": 75.0},
    }
    module.report_error_msg("why", "说明", path)
    expected = {"errorDetail": "why", "errorMsg": "说明", "score": 0, "scoreJson": {}, "success": False}
    assert json.loads(Path(path).read_text()) == expected
    module.dump_2_json([1, "二"], path)
    assert Path(path).read_text() == '[1, "\\u4e8c"]'
    assert module.NUM_K == 10
