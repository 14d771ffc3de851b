"""The published results of models, as their authors give them; `models` prints them, and `evaluate` beside its own."""

from typing import Literal, NamedTuple

Query = Literal["text", "image"]
Setup = Literal["zero-shot", "fine-tuned"]

CHINESE_CLIP = "https://github.com/OFA-Sys/Chinese-CLIP/blob/master/Results.md"
# With the best size of Chinese-CLIP it gives those of other models.
README = "https://github.com/OFA-Sys/Chinese-CLIP/blob/master/README.md"
JUNE_2022 = "https://github.com/OFA-Sys/Chinese-CLIP (README.md, 2022-06)"
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

_OF_OTHERS: _Tables = {
    ("MUGE", "text", "zero-shot"): {
        "Wukong": (42.7, 69.0, 78.0, 63.2),
        "R2D2": (49.5, 75.7, 83.2, 69.5),
    },
    ("MUGE", "text", "fine-tuned"): {
        "Wukong": (52.7, 77.9, 85.6, 72.1),
        "R2D2": (60.1, 82.9, 89.4, 77.5),
    },
    ("Flickr30K-CN", "text", "zero-shot"): {
        "Wukong": (51.7, 78.9, 86.3),
        "Taiyi": (60.8, 85.0, 91.0),
        "R2D2": (60.9, 86.8, 92.7),
    },
    ("Flickr30K-CN", "text", "fine-tuned"): {
        "Wukong": (77.4, 94.5, 97.0),
        "R2D2": (84.4, 96.7, 98.4),
    },
    ("Flickr30K-CN", "image", "zero-shot"): {
        "Wukong": (76.1, 94.8, 97.5),
        "R2D2": (77.6, 96.7, 98.9),
    },
    ("Flickr30K-CN", "image", "fine-tuned"): {
        "Wukong": (92.7, 99.1, 99.6),
        "R2D2": (95.6, 99.8, 100.0),
    },
    ("COCO-CN", "text", "zero-shot"): {
        "Wukong": (53.4, 80.2, 90.1),
        "Taiyi": (60.0, 84.0, 93.3),
        "R2D2": (56.4, 85.0, 93.1),
    },
    ("COCO-CN", "text", "fine-tuned"): {
        "Wukong": (74.0, 94.4, 98.1),
        "R2D2": (79.1, 96.5, 98.9),
    },
    ("COCO-CN", "image", "zero-shot"): {
        "Wukong": (55.2, 81.0, 90.6),
        "R2D2": (63.3, 89.3, 95.7),
    },
    ("COCO-CN", "image", "fine-tuned"): {
        "Wukong": (73.3, 94.0, 98.0),
        "R2D2": (79.3, 97.1, 98.7),
    },
}
_OF_JUNE_2022: _Tables = {
    ("MUGE", "text", "zero-shot"): {
        "Wukong-ViT-B": (33.4, 59.3, 69.7, 54.1),
        "ViT-B-16 (2022-06)": (52.1, 76.7, 84.4, 71.1),
    },
    ("MUGE", "text", "fine-tuned"): {
        "Wukong-ViT-B": (39.2, 66.9, 77.4, 61.2),
        "R2D2-ViT-B": (47.4, 75.1, 83.5, 68.7),
        "ViT-B-16 (2022-06)": (56.8, 82.4, 89.3, 76.2),
    },
    ("Flickr30K-CN", "text", "zero-shot"): {
        "Wukong-ViT-B": (45.7, 73.8, 82.2),
        "ViT-B-16 (2022-06)": (57.0, 82.8, 89.6),
    },
    ("Flickr30K-CN", "text", "fine-tuned"): {
        "Wukong-ViT-B": (67.6, 89.6, 94.2),
        "R2D2-ViT-B": (78.3, 94.6, 97.0),
        "ViT-B-16 (2022-06)": (72.9, 92.8, 96.2),
    },
    ("Flickr30K-CN", "image", "zero-shot"): {
        "Wukong-ViT-B": (66.2, 88.7, 94.3),
        "ViT-B-16 (2022-06)": (71.0, 90.6, 95.3),
    },
    ("Flickr30K-CN", "image", "fine-tuned"): {
        "Wukong-ViT-B": (83.9, 97.6, 99.0),
        "R2D2-ViT-B": (92.6, 99.1, 99.8),
        "ViT-B-16 (2022-06)": (88.6, 98.0, 99.3),
    },
    ("COCO-CN", "text", "zero-shot"): {
        "Wukong-ViT-B": (49.2, 79.4, 87.9),
        "ViT-B-16 (2022-06)": (58.8, 85.3, 93.3),
    },
    ("COCO-CN", "text", "fine-tuned"): {
        "Wukong-ViT-B": (67.0, 91.4, 96.7),
        "R2D2-ViT-B": (75.1, 94.2, 98.1),
        "ViT-B-16 (2022-06)": (73.6, 94.9, 97.8),
    },
    ("COCO-CN", "image", "zero-shot"): {
        "Wukong-ViT-B": (48.3, 77.8, 88.8),
        "ViT-B-16 (2022-06)": (54.7, 84.7, 92.3),
    },
    ("COCO-CN", "image", "fine-tuned"): {
        "Wukong-ViT-B": (65.8, 90.3, 96.6),
        "R2D2-ViT-B": (76.1, 95.3, 98.5),
        "ViT-B-16 (2022-06)": (73.6, 94.8, 98.1),
    },
}
_SOURCES: tuple[tuple[str, _Tables], ...] = (
    (CHINESE_CLIP, _OF_CHINESE_CLIP),
    (QA_CLIP, _OF_QA_CLIP),
    (README, _OF_OTHERS),
    (JUNE_2022, _OF_JUNE_2022),
)
# Models that are not to be had here by name, whose results the sources set beside those of Chinese-CLIP. That of June
# 2022 is ViT-B-16 as it was before its weights were replaced.
OTHERS = ("Wukong", "Taiyi", "R2D2", "Wukong-ViT-B", "R2D2-ViT-B", "ViT-B-16 (2022-06)")


def results_of(name: str) -> list[Result]:
    """What is published of a model, in the order of the sources; empty where nothing is."""
    return [
        Result(*where, numbers[0], numbers[1], numbers[2], numbers[3] if len(numbers) == 4 else None, source)
        for source, tables in _SOURCES
        for where, table in tables.items()
        for known, numbers in table.items()
        if known == name
    ]
