"""A Gradio Space: labels of a picture, and how alike a picture and a text are. Needs `cn_clip` and `gradio`.

MODEL names any model that `cn-clip` opens: a published name, a file of weights, `hf:OWNER/NAME`.
"""

import os

import gradio as gr
from PIL import Image

from cn_clip.clip import Encoder
from cn_clip.evaluation import zeroshot

encoder = Encoder(os.environ.get("MODEL", "ViT-B-16"))
scale = encoder.facts.logit_scale or zeroshot.LOGIT_SCALE


def label(picture: Image.Image, labels: str, template: str) -> dict[str, float]:
    """The probability of each label, one a line; the template has a {} for it."""
    names = [name.strip() for name in labels.splitlines() if name.strip()]
    if picture is None or not names or template.count("{}") != 1:
        raise gr.Error("需要一张图片、至少一个标签、含一个 {} 的模板 / a picture, a label, and a template with one {}")
    texts_CD = encoder.encode_texts([template.replace("{}", name) for name in names])
    (shares_C,) = zeroshot.probabilities(encoder.encode_images([picture]), texts_CD, scale=scale).tolist()
    return dict(zip(names, shares_C, strict=True))


def likeness(picture: Image.Image, text: str) -> str:
    """The cosine of a picture and a text."""
    if picture is None or not text.strip():
        raise gr.Error("需要一张图片和一句话 / a picture and a text")
    return f"{float(encoder.encode_images([picture])[0] @ encoder.encode_texts([text])[0]):.4f}"


labels = gr.Interface(
    label,
    [gr.Image(type="pil"), gr.Textbox("猫\n狗\n鸟", lines=5, label="标签 / labels"), gr.Textbox("一张{}的图片")],
    gr.Label(num_top_classes=10),
)
pair = gr.Interface(
    likeness, [gr.Image(type="pil"), gr.Textbox(label="文字 / text")], gr.Textbox(label="余弦 / cosine")
)
gr.TabbedInterface([labels, pair], ["标签 / labels", "图文相似度 / likeness"], title="Chinese-CLIP").launch()
