"""ImageNet's 1,000 classes in Chinese, in the order of their numbers, and templates, under Chinese-CLIP's names.

The names and the texts are this package's own.
"""

from cn_clip.eval.cvinw_zeroshot_templates import GENERAL, templates
from cn_clip.evaluation.benchmark_sets import class_names

imagenet_classnames: list[str] = [one.chinese for one in class_names("imagenet-cn")]
openai_imagenet_template = templates("imagenet", GENERAL, 80)
