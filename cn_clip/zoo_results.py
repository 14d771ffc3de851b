"""The published results of the published models, as their authors give them; `models` prints them."""

from typing import Literal, NamedTuple

Query = Literal["text", "image"]
Setup = Literal["zero-shot", "fine-tuned"]

CHINESE_CLIP = "https://github.com/OFA-Sys/Chinese-CLIP/blob/master/Results.md"
QA_CLIP = "https://github.com/TencentARC-QQ/QA-CLIP/blob/main/README_CN.md"


class Result(NamedTuple):
    """Recall in percent. `query` is what is searched with; `mean` is None where the source does not give it."""

    dataset: str
    query: Query
    setup: Setup
    recall_1: float
    recall_5: float
    recall_10: float
    mean: float | None
    source: str


# The split that the sources measure on.
SPLITS = {"MUGE": "valid", "Flickr30K-CN": "test", "COCO-CN": "test"}

_Numbers = tuple[float, ...]
_Tables = dict[tuple[str, Query, Setup], dict[str, _Numbers]]

# R@1, R@5, R@10 and, for MUGE, their mean, which was rounded after averaging.
_OF_CHINESE_CLIP: _Tables = {
    ("MUGE", "text", "zero-shot"): {
        "RN50": (42.6, 68.6, 77.9, 63.0),
        "ViT-B-16": (52.1, 76.7, 84.4, 71.1),
        "ViT-L-14": (56.3, 79.8, 86.2, 74.1),
        "ViT-L-14-336": (59.0, 81.4, 87.8, 76.1),
        "ViT-H-14": (63.0, 84.1, 89.2, 78.8),
    },
    ("MUGE", "text", "fine-tuned"): {
        "RN50": (48.6, 75.1, 84.0, 69.2),
        "ViT-B-16": (58.4, 83.6, 90.0, 77.4),
        "ViT-L-14": (63.3, 85.6, 91.3, 80.1),
        "ViT-L-14-336": (65.3, 86.7, 92.1, 81.3),
        "ViT-H-14": (68.9, 88.7, 93.1, 83.6),
    },
    ("Flickr30K-CN", "text", "zero-shot"): {
        "RN50": (48.8, 76.0, 84.6),
        "ViT-B-16": (62.7, 86.9, 92.8),
        "ViT-L-14": (68.0, 89.7, 94.4),
        "ViT-L-14-336": (69.0, 90.7, 95.4),
        "ViT-H-14": (71.2, 91.4, 95.5),
    },
    ("Flickr30K-CN", "text", "fine-tuned"): {
        "RN50": (66.7, 89.4, 94.1),
        "ViT-B-16": (79.1, 94.8, 97.4),
        "ViT-L-14": (82.7, 96.7, 98.6),
        "ViT-L-14-336": (84.4, 97.1, 98.7),
        "ViT-H-14": (83.8, 96.9, 98.6),
    },
    ("Flickr30K-CN", "image", "zero-shot"): {
        "RN50": (60.0, 85.9, 92.0),
        "ViT-B-16": (74.6, 93.5, 97.1),
        "ViT-L-14": (80.2, 96.6, 98.2),
        "ViT-L-14-336": (83.3, 97.2, 98.5),
        "ViT-H-14": (81.6, 97.5, 98.8),
    },
    ("Flickr30K-CN", "image", "fine-tuned"): {
        "RN50": (84.2, 96.7, 98.0),
        "ViT-B-16": (93.5, 99.0, 99.5),
        "ViT-L-14": (96.1, 99.5, 99.9),
        "ViT-L-14-336": (96.6, 99.8, 100.0),
        "ViT-H-14": (95.3, 99.7, 100.0),
    },
    ("COCO-CN", "text", "zero-shot"): {
        "RN50": (48.1, 81.3, 90.5),
        "ViT-B-16": (62.2, 86.6, 94.9),
        "ViT-L-14": (64.0, 89.2, 94.4),
        "ViT-L-14-336": (64.7, 89.6, 94.6),
        "ViT-H-14": (69.2, 89.9, 96.1),
    },
    ("COCO-CN", "text", "fine-tuned"): {
        "RN50": (66.8, 91.1, 97.0),
        "ViT-B-16": (77.0, 97.1, 99.0),
        "ViT-L-14": (78.9, 96.3, 99.0),
        "ViT-L-14-336": (80.1, 96.7, 99.2),
        "ViT-H-14": (81.5, 96.9, 99.1),
    },
    ("COCO-CN", "image", "zero-shot"): {
        "RN50": (51.6, 81.2, 90.5),
        "ViT-B-16": (57.0, 84.1, 93.6),
        "ViT-L-14": (60.4, 84.2, 92.9),
        "ViT-L-14-336": (63.4, 87.2, 94.4),
        "ViT-H-14": (63.0, 86.6, 92.9),
    },
    ("COCO-CN", "image", "fine-tuned"): {
        "RN50": (68.4, 93.3, 97.8),
        "ViT-B-16": (77.4, 96.2, 98.9),
        "ViT-L-14": (80.2, 96.7, 99.2),
        "ViT-L-14-336": (81.2, 97.2, 99.1),
        "ViT-H-14": (83.5, 97.3, 99.2),
    },
}
_OF_QA_CLIP: _Tables = {
    ("MUGE", "text", "zero-shot"): {
        "QA-CLIP-RN50": (44.0, 69.9, 79.5),
        "QA-CLIP-ViT-B-16": (53.2, 77.7, 85.1),
        "QA-CLIP-ViT-L-14": (57.4, 81.0, 87.7),
        "QA-CLIP-ViT-L-14-336": (59.6, 81.9, 88.1),
    },
    ("MUGE", "image", "zero-shot"): {
        "QA-CLIP-RN50": (32.4, 59.5, 70.3),
        "QA-CLIP-ViT-B-16": (40.7, 68.2, 77.2),
        "QA-CLIP-ViT-L-14": (45.5, 73.0, 81.4),
        "QA-CLIP-ViT-L-14-336": (47.5, 74.7, 83.1),
    },
    ("Flickr30K-CN", "text", "zero-shot"): {
        "QA-CLIP-RN50": (50.5, 77.4, 86.1),
        "QA-CLIP-ViT-B-16": (63.8, 88.0, 93.2),
        "QA-CLIP-ViT-L-14": (69.3, 90.3, 94.7),
        "QA-CLIP-ViT-L-14-336": (71.1, 91.5, 95.8),
    },
    ("Flickr30K-CN", "image", "zero-shot"): {
        "QA-CLIP-RN50": (67.1, 87.9, 93.2),
        "QA-CLIP-ViT-B-16": (78.4, 96.1, 98.5),
        "QA-CLIP-ViT-L-14": (85.3, 97.9, 99.2),
        "QA-CLIP-ViT-L-14-336": (87.2, 98.1, 99.1),
    },
    ("COCO-CN", "text", "zero-shot"): {
        "QA-CLIP-RN50": (50.1, 82.5, 91.7),
        "QA-CLIP-ViT-B-16": (62.9, 87.7, 94.7),
        "QA-CLIP-ViT-L-14": (65.7, 90.2, 95.0),
        "QA-CLIP-ViT-L-14-336": (65.9, 90.2, 94.9),
    },
    ("COCO-CN", "image", "zero-shot"): {
        "QA-CLIP-RN50": (56.7, 85.2, 92.9),
        "QA-CLIP-ViT-B-16": (61.5, 87.6, 94.8),
        "QA-CLIP-ViT-L-14": (64.5, 88.3, 95.1),
        "QA-CLIP-ViT-L-14-336": (66.2, 88.3, 95.7),
    },
}


def results_of(name: str) -> list[Result]:
    """What is published of a model, in the order of the sources; empty where nothing is."""
    return [
        Result(*where, numbers[0], numbers[1], numbers[2], numbers[3] if len(numbers) == 4 else None, source)
        for source, tables in ((CHINESE_CLIP, _OF_CHINESE_CLIP), (QA_CLIP, _OF_QA_CLIP))
        for where, table in tables.items()
        for known, numbers in table.items()
        if known == name
    ]
