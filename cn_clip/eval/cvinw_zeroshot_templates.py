"""Prompt templates under Chinese-CLIP's names: lists, as long as its lists, of functions from a label to a text.

The texts are this package's own, first those that `cn-clip zeroshot` uses for the dataset.
"""

from collections.abc import Callable, Iterable
from itertools import islice, product
from typing import TypeAlias

from cn_clip.clip.templates import fill, load_templates

Template: TypeAlias = Callable[[str], str]

_VIEWS = ("近处的", "远处的", "正面的", "侧面的", "俯拍的", "明亮的", "昏暗的", "模糊的", "清晰的", "鲜艳的", "逆光的")
_MEDIA = (
    "照片",
    "快照",
    "海报",
    "封面",
    "邮票",
    "插图",
    "截图",
    "木雕",
    "水彩画",
    "油画",
    "素描",
    "剪纸",
    "雕塑",
    "像素画",
)
_PLACES = ("停机坪上", "跑道上", "机库里", "登机口外", "云层上", "夕阳下", "晨雾里", "雨中", "航展上", "机场边")
_MOMENTS = ("滑行", "起飞", "爬升", "巡航", "转弯", "下降", "着陆", "检修", "待命")


def templates(dataset: str, more: Iterable[str], length: int) -> list[Template]:
    """The first `length` of the dataset's own templates and then `more`, as functions."""
    texts = list(islice((*load_templates(dataset), *more), length))
    assert len(texts) == length == len(set(texts))
    return [_function(text) for text in texts]


def _function(text: str) -> Template:
    return lambda label: fill(text, label)


def _only(*texts: str) -> list[Template]:
    return [_function(text) for text in texts]


GENERAL = tuple(f"一幅{view}{{}}{medium}" for view, medium in product(_VIEWS, _MEDIA))

openai_templates = templates("imagenet", GENERAL, 183)
normal_templates = _only("{}的图像")
flower_templates = templates(
    "oxford-flower-102",
    (f"{place}{state}{{}}" for place in ("窗台上", "山坡上", "路边", "温室里") for state in _VIEWS[5:]),
    32,
)
food_templates = templates("food-101", (f"{view}{{}}，美食摄影" for view in _VIEWS[:8]), 21)
aircraft_templates = templates(
    "fgvc-aircraft-2013b-variants102",
    (f"{place}{moment}的{{}}飞机" for place, moment in product(_PLACES, _MOMENTS)),
    100,
)
eurosat_templates = templates(
    "eurosat_clip", (f"{view}{{}}{kind}" for view, kind in product(_VIEWS, ("航拍图", "卫星影像"))), 24
)
hatefulmemes_templates = _only("一张{}的网络配图", "这张配图的文字是{}")
kitti_templates = _only("{}", "行车记录仪拍到：{}", "街道的照片，{}")
cars_templates = _only(
    "{}汽车", "一辆{}", "停着的{}", "行驶中的{}", "一张{}汽车的照片", "车展上的{}", "这辆车的型号是{}"
)
dtd_templates = _only("{}的纹理", "{}的花纹", "表面是{}的", "一块{}的材料", "{}质地的特写", "布满{}图案的画面")
country211_templates = templates("country211", (), 4)
patch_templates = _only("{}的病理切片", "显微镜下的组织，{}", "这张切片显示{}")
pet_templates = _only("一只{}", "宠物{}", "一张{}的照片", "这只宠物的品种是{}", "趴在家里的{}", "正在玩耍的{}")
cifar100_templates = _only(
    "{}", "{}的小图", "一张{}的照片", "一张放大的{}照片", "一张很小的{}照片", "低像素的{}", "看不太清的{}", "颜色淡的{}"
) + _only("对比强烈的{}", "黑白的{}", "图里是{}")
caltech101_templates = _only(
    "{}", "{}的照片", "{}的图画", "{}的线条画", "{}的模型", "{}的玩偶", "{}的塑像", "{}的贴纸"
) + _only("{}的图标", "{}的浮雕", "游戏中出现的{}", "画册里的{}", "白底的{}", "手工做的{}", "漫画里的{}", "一个{}")
fer_templates = _only("{}的表情", "一张{}的脸", "这个人看上去很{}", "脸上的情绪是{}", "神情{}的人像")
