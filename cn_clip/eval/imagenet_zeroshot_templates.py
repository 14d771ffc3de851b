"""ImageNet's 1,000 classes in Chinese, in the order of their numbers, and templates, under Chinese-CLIP's names.

The names and the texts are this package's own.
"""

import json
from pathlib import Path

from cn_clip.eval.cvinw_zeroshot_templates import GENERAL, templates

imagenet_classnames: list[str] = json.loads(
    Path(__file__).with_name("imagenet_classes.json").read_text(encoding="utf-8")
)
openai_imagenet_template = templates("imagenet", GENERAL, 80)
