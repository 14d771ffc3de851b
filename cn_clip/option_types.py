"""The options that several commands have: one declaration of each, with its help text and its bounds.

`num_workers: NumWorkers = None` is all that a command says; `settings.check` holds the bounds.
"""

from typing import Annotated, Literal, TypeAlias

import tyro

from cn_clip.settings import Range
from cn_clip.zoo import TextName, VisionName


def _help(text: str, *, is_required: bool = False) -> object:
    return tyro.conf.arg(help=text, help_behavior_hint="(required)" if is_required else None)


_DEVICES = "auto, cpu, cuda, cuda:N or mps"
_LONGEST = "Longest text in tokens, [CLS] and [SEP] included; default: that of the checkpoint's training, else 52"
_PRECISION = "Type of the weights; fp16 as in the published models: norms of the picture tower stay float32"

Json: TypeAlias = Annotated[bool, _help("Print the result as one JSON object")]

Device: TypeAlias = Annotated[str, _help(_DEVICES)]
BackendDevice: TypeAlias = Annotated[str, _help(f"{_DEVICES}; openvino computes on the cpu alone")]
CudaDevice: TypeAlias = Annotated[str, _help("cuda or cuda:N")]
NumThreads: TypeAlias = Annotated[int | None, _help("Threads that compute; default: one a core"), Range(least=1)]
StrictFp32: TypeAlias = Annotated[
    bool, _help("Multiply float32 in full on CUDA, not as TF32, which keeps 10 bits of fraction; slower")
]
MergeTokens: TypeAlias = Annotated[
    int | None,
    _help(
        "Merge so many alike patches in each layer of a ViT: ViT-B-16 is 1.3 times as fast with 8, 1.5 with 12, and "
        "finds a little less; default: none"
    ),
    Range(least=0),
]
MergeTokensOfIndex: TypeAlias = Annotated[
    int | None,
    _help("Merge so many alike patches in each layer of a ViT; default: as the index has it, else none"),
    Range(least=0),
]
Dimensions: TypeAlias = Annotated[
    int | None,
    _help(
        "Keep only the first so many numbers of each vector, of a model that was trained so (Matryoshka); "
        "default: all, or as the index has it"
    ),
    Range(least=1),
]
NumWorkers: TypeAlias = Annotated[
    int | None,
    _help("Threads that decode pictures; 0: decode between the batches; default: one a core, at most 16"),
    Range(least=0),
]
BatchSize: TypeAlias = Annotated[int, _help("Pictures in a batch"), Range(least=1)]

DownloadRoot: TypeAlias = Annotated[
    str | None, _help("Folder of downloaded and exported models; default: ~/.cache/clip")
]
PictureTower: TypeAlias = Annotated[VisionName | None, _help("Picture tower; default: what the checkpoint holds")]
TextTower: TypeAlias = Annotated[TextName | None, _help("Text tower; default: what the checkpoint holds")]
ContextLength: TypeAlias = Annotated[int, _help(_LONGEST), Range(least=3)]
WeightType: TypeAlias = Annotated[Literal["keep", "fp16", "fp32"], _help(_PRECISION)]
Templates: TypeAlias = Annotated[
    str | None, _help("File of your own prompt templates: a JSON list, or one a line, each with one {}")
]

ConvertText: TypeAlias = Annotated[bool, _help("Convert the text tower")]
ConvertVision: TypeAlias = Annotated[bool, _help("Convert the picture tower")]
OnnxText: TypeAlias = Annotated[str | None, _help("ONNX file of the text tower")]
OnnxImage: TypeAlias = Annotated[str | None, _help("ONNX file of the picture tower")]
OutputPrefix: TypeAlias = Annotated[str | None, _help("The PREFIX of what is written", is_required=True)]

DataDir: TypeAlias = Annotated[str, _help("The folder with the tsv files of pictures and the jsonl files of sentences")]
CheckPictures: TypeAlias = Annotated[
    Literal["decode", "header", "none"],
    _help("How closely to look at each picture: decode it, read its header, or only its base64"),
]
Shrink: TypeAlias = Annotated[
    int | None,
    _help(
        "Store pictures whose shorter side has more pixels with just so many, as JPEG (PNG where the file was "
        "lossless): 256 does for models of 224; default: the files as they are"
    ),
    Range(least=1),
]
CheckWorkers: TypeAlias = Annotated[int, _help("Threads that decode pictures for the check"), Range(least=0)]
