"""What the web page says: labels, examples, sentences for refusals, and its looks."""

from cn_clip.serve.limits import MAX_K, MAX_LABELS, MAX_TEMPLATES, MAX_TEXT_CHARS

TITLE = "cn-clip · 中文图文检索 / Chinese CLIP"
PHRASES = ("小猫", "下雨天", "生日蛋糕", "想吃水果", "晚上的月亮", "坐飞机")
LABELS = ("猫", "狗", "鸟", "鱼", "花", "水果", "蛋糕", "汽车", "飞机", "船", "月亮", "心")
TEMPLATES = ("一张{}的图片", "{}")

NO_INDEX = (
    "启动时没有给出索引，所以不能搜图；另外两页照常可用。先建索引，再带着它启动 / No index was opened, so there is "
    "nothing to search. Build one, and start with it:\n\n"
    "```\ncn-clip index build 图片文件夹 --output photos.index\ncn-clip serve photos.index\n```"
)
SOFTMAX = (
    "概率假定答案就在标签里；可能都不是时，加一个“其他”之类的标签。 / "
    "The probabilities take it for granted that one of the labels is right."
)
NOTHING_FOUND = "没有达到最低分的图片 / no picture reaches the minimum score"
NO_TEXT = "请先写一句话 / write a phrase first"
NO_PICTURE = "请先放一张图片 / drop a picture first"
TIMEOUT = "没有在限定的时间内算完，请稍后再试 / not answered in time; try again later"
FAILED = "服务器出错，原因在它的日志里 / the server failed; its log tells why"

# By the first field at fault.
FAULTS = {
    "query": f"文字请写 1 到 {MAX_TEXT_CHARS} 个字 / 1 to {MAX_TEXT_CHARS} characters, please",
    "labels": (
        f"标签一行一个，1 到 {MAX_LABELS} 个，每个不超过 {MAX_TEXT_CHARS} 个字 / "
        f"1 to {MAX_LABELS} labels, one a line, of at most {MAX_TEXT_CHARS} characters"
    ),
    "templates": (
        f"模板一行一个，1 到 {MAX_TEMPLATES} 个，每个要有且只有一处 {{}} / "
        f"1 to {MAX_TEMPLATES} templates, one a line, each with exactly one {{}}"
    ),
    "k": f"张数应为 1 到 {MAX_K} 的整数 / k: a whole number from 1 to {MAX_K}",
    "min_score": "最低分应在 -1 到 1 之间 / minimum score: from -1 to 1",
}
# By the code of the refusal; what the service itself says stands behind.
REFUSALS = {
    "not_ready": "模型还没打开，请稍后再试",
    "queue_full": "排队的请求太多，请稍后再试",
    "timeout": "没有在限定的时间内算完，请稍后再试",
    "image_too_large": "图片的像素太多",
    "invalid_image": "读不出这张图片",
    "no_upload": "只读取上传的图片，不读路径和网址",
    "index_not_found": "启动时没有给出索引",
    "too_many_items": "标签和模板太多",
}
REFUSED = "做不到"

ICON = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">
<rect width="16" height="16" rx="3" fill="#6366f1"/>
<g fill="none" stroke="#fff" stroke-width="1.8"><circle cx="7" cy="7" r="3.5"/><path d="M9.6 9.6l3 3"/></g></svg>"""
CSS = """
.gradio-container main { width: 100%; max-width: 1080px !important; margin: 0 auto !important; }
.hits { display: grid; grid-template-columns: repeat(auto-fill, minmax(128px, 1fr)); gap: 12px; }
.hits figure { margin: 0; padding: 8px; border: 1px solid var(--border-color-primary); border-radius: 8px;
  background: var(--background-fill-primary); }
.hits .picture { height: 112px; border-radius: 4px; background: #fff; display: flex; align-items: center;
  justify-content: center; color: #888; }
.hits img { max-width: 100%; max-height: 112px; object-fit: contain; }
.hits figcaption { margin-top: 6px; font-size: 14px; line-height: 1.3; overflow-wrap: anywhere;
  display: flex; justify-content: space-between; gap: 6px; }
.hits .name { display: -webkit-box; -webkit-line-clamp: 2; -webkit-box-orient: vertical; overflow: hidden; }
.facts th { text-align: left; }
.facts th, .facts td { padding: 8px 32px 8px 8px; border: 1px solid var(--border-color-primary) !important; }
.hits .score { white-space: nowrap; color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; }
"""
