"""The parts of the report as HTML: what was read and computed goes in, markup comes out."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from cn_clip.clip.pictures import open_picture
from cn_clip.data.pictures import load_picture
from cn_clip.report import charts
from cn_clip.report.markup import Markup, both, element, joined, quoted, shortened
from cn_clip.report.page import Section
from cn_clip.report.run_folder import DIRECTIONS, Run, is_finite, mean_recall
from cn_clip.report.thumbnails import LARGEST_SIDE, flattened, thumbnail
from cn_clip.retrieval.recall import KS, Recall
from cn_clip.training.curves import smoothed

if TYPE_CHECKING:
    from cn_clip.report.confusion import Confusion, Mistake
    from cn_clip.report.queries import Hit, Query, Retrieval
    from cn_clip.report.regions import PairView

# Bytes of JPEG: 24 queries of 10 pictures and their own, 12 mistakes and 12 pairs stay below 3 MB as base64.
HIT_SIDE, HIT_BYTES = 144, 6_000
VIEW_BYTES = 16_000
# Rows of the table of validations, and classes whose accuracy is shown.
MOST_ROWS, MOST_BARS = 40, 60
WAYS = {"text_to_image": ("以文搜图", "text → image"), "image_to_text": ("以图搜文", "image → text")}
RECALL_LINES = {"r1": ("R@1", "violet"), "r5": ("R@5", "lilac"), "r10": ("R@10", "blue")}
RECALL_LINES |= {"mean_recall": ("MR", "amber dashed")}
FACTS = {
    "vision_model": ("图片塔", "picture tower"),
    "text_model": ("文本塔", "text tower"),
    "train_data": ("训练数据", "training data"),
    "val_data": ("验证数据", "validation data"),
    "resume": ("起始权重", "started from"),
    "loss": ("损失", "loss"),
    "lr": ("学习率", "learning rate"),
    "warmup": ("预热步数", "warm-up steps"),
    "wd": ("权重衰减", "weight decay"),
    "precision": ("精度", "precision"),
    "seed": ("种子", "seed"),
}


def percent(value: float) -> str:
    """Percent with as many decimals as tell something."""
    return f"{value:.0f}" if value >= 99.95 or value == 0 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def duration(seconds: float) -> str:
    """`1 h 02 min`, `3 min 05 s` or `12 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes_left:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


# --- the run


def run_section(run: Run) -> Section:
    """Facts, curves, the table of validations, all settings."""
    body = joined([_headline(run), _facts(run), _charts(run), _validation_table(run), _settings(run)])
    return Section("run", "训练过程", "The run", body)


def _figures(entries: Sequence[tuple[str, str, str]]) -> Markup:
    items = (
        element("li", element("b", value), element("span", both(chinese, english), class_="what"))
        for value, chinese, english in entries
    )
    return element("ul", *items, class_="figures")


def _headline(run: Run) -> Markup:
    entries = []
    best = run.best()
    if best is not None:
        entries.append((f"{percent(best[1] * 100)} %", f"最好的 MR，第 {best[0]:,} 步", "best mean recall"))
    _, losses = run.points("train", "loss")
    if len(losses):
        entries.append((f"{losses[-1]:.3f}", "最后的训练损失", "last training loss"))
    of_all = ("步，共 " + f"{run.max_steps:,}", f"of {run.max_steps:,} steps") if run.max_steps else ("步", "steps")
    entries.append((f"{run.last_step:,}", *of_all))
    if run.log.seconds:
        entries.append((duration(run.log.seconds), "用时", "time, by the log"))
    _, speeds = run.points("train", "samples_per_second")
    if len(speeds):
        entries.append((f"{np.median(speeds):,.0f}", "样本每秒，中位数", "samples/s, median"))
    return _figures(entries)


def _facts(run: Run) -> Markup:
    shown = {name: run.params[name] for name in FACTS if run.params.get(name, "None") not in ("None", "")}
    rows = [(both(*FACTS[name]), quoted(value)) for name, value in shown.items()]
    if run.global_batch:
        rows.append((both("全局批大小", "global batch"), Markup(f"{run.global_batch:,}")))
    _, memory = run.points("train", "peak_memory_gib")
    if len(memory):
        rows.append((both("内存或显存峰值", "peak memory"), Markup(f"{memory.max():.2f} GiB")))
    if run.begin_and_end:
        begin, end = (time.strftime("%Y-%m-%d %H:%M:%S") for time in run.begin_and_end)
        rows.append((both("起止时间", "from, to"), Markup(f"{begin} – {end}")))
    if run.checkpoints:
        rows.append((both("检查点", "checkpoints"), quoted(f"{len(run.checkpoints)}：{'、'.join(run.checkpoints)}")))
    if run.num_infinite:
        words = f"{run.num_infinite} 次记录的损失不是数 / logged losses are no number"
        rows.append((both("注意", "beware"), element("b", words, class_="red")))
    rows.append((both("曲线来自", "curves from"), quoted(run.source)))
    return element("dl", *(joined([element("dt", name), element("dd", value)]) for name, value in rows), class_="facts")


def _charts(run: Run) -> Markup:
    steps, losses = run.points("train", "loss")
    loss_lines = [
        charts.Line("", (steps, losses), "raw"),
        charts.Line("训练（平滑）train, smoothed", (steps, smoothed(losses)), "blue"),
        charts.Line("验证 valid", run.points("valid", "loss"), "red", marked=True),
        charts.Line("随机 chance", run.points("train", "chance_loss"), "chance"),
    ]
    drawn = [charts.line_chart(both("损失", "loss, nats"), loss_lines, form=lambda value: f"{value:.4g}")]
    drawn += [_recall_chart(run, way) for way in DIRECTIONS]
    if not any(drawn[1:]):
        drawn.append(_accuracy_chart(run))
    rate = [charts.Line("", run.points("train", "lr"), "green")]
    drawn.append(charts.line_chart(both("学习率", "learning rate"), rate, form=_rate, from_zero=True))
    speed = [charts.Line("", run.points("train", "samples_per_second"), "amber")]
    title = both("速度，样本每秒", "speed, samples/s")
    drawn.append(charts.line_chart(title, speed, form=lambda value: f"{value:,.4g}", from_zero=True))
    return element("div", *map(Markup, drawn), class_="charts")


def _rate(value: float) -> str:
    if not value:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def _recall_chart(run: Run, way: str) -> str:
    lines = [
        charts.Line(name, run.points("valid", f"{way}_{key}", factor=100), style, marked=True)
        for key, (name, style) in RECALL_LINES.items()
    ]
    chinese, english = WAYS[way]
    return charts.line_chart(
        both(f"召回率 %：{chinese}", f"recall, {english}"), lines, form=lambda value: f"{value:.4g}", from_zero=True
    )


def _accuracy_chart(run: Run) -> str:
    styles = {"text_to_image": "violet", "image_to_text": "amber"}
    lines = [
        charts.Line(WAYS[way][1], run.points("valid", f"{way}_acc", factor=100), styles[way], marked=True)
        for way in DIRECTIONS
    ]
    title = both("验证批内准确率 %（日志里没有召回率）", "accuracy inside validation batches; no recall in the log")
    return charts.line_chart(title, lines, form=lambda value: f"{value:.4g}", from_zero=True)


def _validation_table(run: Run) -> Markup:
    records = [record for record in run.validations() if mean_recall(record) is not None]
    if not records:
        return Markup("")
    best = run.best()
    columns = [f"{way}_{name}" for way in DIRECTIONS for name in RECALL_LINES]
    names = [name for _ in DIRECTIONS for name, _ in RECALL_LINES.values()]
    groups = [element("th", both(*WAYS[way]), colspan=len(RECALL_LINES), scope="colgroup") for way in DIRECTIONS]
    top = element("tr", element("th", both("步", "step"), rowspan=2, scope="col"), *groups)
    below = element("tr", *(element("th", name, scope="col") for name in names))
    rows = []
    for record in records[-MOST_ROWS:]:
        values = [record.get(name) for name in columns]
        cells = [element("td", f"{value * 100:.2f}" if is_finite(value) else "–") for value in values]
        kind = "best" if best and record["step"] == best[0] else None
        rows.append(element("tr", element("th", f"{record['step']:,}", scope="row"), *cells, class_=kind))
    table = element("table", element("thead", top, below), element("tbody", *rows))
    left_out = f"，只列最后 {MOST_ROWS} 次 / the last {MOST_ROWS}" if len(records) > MOST_ROWS else ""
    title = element(
        "summary", both(f"每次验证的召回率，共 {len(records)} 次{left_out}", "recall of every validation, %")
    )
    return element("details", title, element("div", table, class_="table"), open=len(records) <= 8)


def _settings(run: Run) -> Markup:
    if not run.params:
        return Markup("")
    items = (element("li", element("code", name), " ", quoted(value)) for name, value in sorted(run.params.items()))
    title = element("summary", both(f"全部 {len(run.params)} 项设置", "all settings"))
    return element("details", title, element("ul", *items, class_="settings"))


# --- retrieval


def retrieval_section(retrieval: "Retrieval") -> Section:
    """Recall of the split, then the best, the middling and the worst queries with their pictures."""
    intro = both(
        f"{retrieval.num_texts:,} 条文本在 {retrieval.num_images:,} 张图片里找自己的图片。",
        "Every text looks for its picture among all of the split.",
    )
    order = both(
        "先按正确图片的名次排，名次相同的看它比最高的错误图片高出多少。绿框是正确的图片，数字是余弦相似度；"
        "前几名里没有正确图片时，它单独放在虚线右边。",
        "Ordered by the rank of the right picture, then by its lead over the best wrong one. Green: the right picture; "
        "numbers: cosine. Behind the dashed line: the right picture, where it is not among the first.",
    )
    where = element("p", both("数据", "data"), " ", quoted(str(retrieval.folder)), class_="note")
    ranks = retrieval.ranks_M
    median = f"{np.median(ranks):,.0f}"
    spread = both(f"正确图片名次的中位数是 {median}", f"median rank of the right picture: {median}")
    groups = (
        _query_group(retrieval, retrieval.best, "最好的查询", "best queries"),
        _query_group(retrieval, retrieval.median, "中间的查询", "queries from the middle"),
        _query_group(retrieval, retrieval.worst, "最差的查询", "worst queries"),
    )
    body = [
        element("p", intro),
        where,
        _recall_table(retrieval),
        element("p", spread),
        element("p", order, class_="note"),
    ]
    return Section("retrieval", "检索：最好与最差的查询", "Retrieval, best and worst", joined([*body, *groups]))


def _recall_table(retrieval: "Retrieval") -> Markup:
    names = [*(f"R@{k}" for k in KS), "MR"]
    head = element("tr", element("td"), *(element("th", name, scope="col") for name in names))
    rows = [
        element("tr", element("th", both(*WAYS[way]), scope="row"), *_recall_cells(getattr(retrieval.recall, way)))
        for way in DIRECTIONS
    ]
    return element("div", element("table", element("thead", head), element("tbody", *rows)), class_="table")


def _recall_cells(recall: Recall) -> list[Markup]:
    return [element("td", f"{value * 100:.2f}") for value in (*recall.at.values(), recall.mean)]


def _query_group(retrieval: "Retrieval", queries: Sequence["Query"], chinese: str, english: str) -> Markup:
    if not queries:
        return Markup("")
    rows = (_query(retrieval, query) for query in queries)
    return joined([element("h3", both(f"{len(queries)} 条{chinese}", english)), *rows])


def _query(retrieval: "Retrieval", query: "Query") -> Markup:
    shots = [_shot(retrieval, hit, place) for place, hit in enumerate(query.hits, start=1)]
    if query.rank > len(query.hits):
        shots.append(_shot(retrieval, query.right, query.rank, own=True))
    told = both(f"正确图片第 {query.rank:,} 名，相似度 {query.right.score:.3f}", f"rank {query.rank:,}")
    heading = element("h4", quoted(query.text), " ", element("span", told, class_="rank"))
    return element("article", heading, element("ol", *shots, class_="hits"), class_="query")


def _shot(retrieval: "Retrieval", hit: "Hit", place: int, *, own: bool = False) -> Markup:
    stored = retrieval.pictures[hit.image]
    said = f"第 {place} 名，图片 {stored.key}" + ("，正确" if hit.is_right else "")
    picture = load_picture(
        stored.data, stored.where, lambda image: thumbnail(image, side=HIT_SIDE, alt=said, num_bytes=HIT_BYTES)
    )
    mark = "✓ " if hit.is_right else ""
    style = " ".join(["shot", *(["right"] if hit.is_right else []), *(["own"] if own else [])])
    rank = [element("br"), f"第 {place:,} 名"] if own else []
    return element("li", picture, f"{mark}{hit.score:.3f}", *rank, class_=style)


# --- zero-shot classification


def confusion_section(confusion: "Confusion") -> Section:
    """Accuracy, the matrix, the pairs confused most with a picture each, accuracy per class."""
    tops = [(f"{percent(confusion.accuracy.top1 * 100)} %", "第一名正确", "top-1 accuracy")]
    if confusion.accuracy.top5 is not None:
        tops.append((f"{percent(confusion.accuracy.top5 * 100)} %", "前五名里有正确的", "top-5 accuracy"))
    tops.append((f"{confusion.num_pictures:,}", f"张图片，{len(confusion.labels):,} 类", "pictures, classes"))
    where = element("p", both("数据", "data"), " ", quoted(str(confusion.folder)), class_="note")
    body = [where, _figures(tops), _matrix(confusion), _mistakes(confusion), _bars(confusion)]
    return Section("zeroshot", "零样本分类：混淆矩阵", "Zero-shot, confusion matrix", joined(body))


def _matrix(confusion: "Confusion") -> Markup:
    from cn_clip.report.confusion import most_confused

    chosen = most_confused(confusion.counts_CC, charts.MOST_CLASSES)
    labels = [confusion.labels[number] for number in chosen]
    said = f"混淆矩阵，{len(labels)} 类，第一名正确率 {confusion.accuracy.top1 * 100:.1f} %"
    counts_CC = confusion.counts_CC[np.ix_(chosen, chosen)]
    totals_C = confusion.counts_CC.sum(axis=1)[chosen]
    told = "每行是一个真实类别，每列是模型给出的类别；颜色越深，占这一行的比例越大：绿色答对，红色答错。"
    english = "Rows: the true class; columns: what it was taken for. Darker: a larger share of the row."
    if len(labels) < len(confusion.labels):
        told += f"类别共 {len(confusion.labels):,} 个，这里是牵涉错误最多的 {len(labels)} 个。"
        english += " Only the classes with the most mistakes are shown."
    drawing = charts.confusion_chart(labels, counts_CC, totals_C, said)
    return joined([element("p", both(told, english), class_="note"), drawing])


def _mistakes(confusion: "Confusion") -> Markup:
    heading = element("h3", both("最常混淆的", "confused most often"))
    if not confusion.mistakes:
        return joined([heading, element("p", both("没有答错的图片。", "No picture was taken for another class."))])
    items = (_mistake(confusion, mistake) for mistake in confusion.mistakes)
    return joined([heading, element("ul", *items, class_="mistakes")])


def _mistake(confusion: "Confusion", mistake: "Mistake") -> Markup:
    labels = (confusion.labels[number] for number in (mistake.true, mistake.taken))
    true, taken = (shortened(label, charts.TITLE_LENGTH) for label in labels)
    said = f"{true}，被认成{taken}"
    image = open_picture(Path(mistake.sample), name=mistake.sample)
    picture = thumbnail(image, side=HIT_SIDE, alt=said, num_bytes=HIT_BYTES)
    share = f"{mistake.count} / {confusion.counts_CC[mistake.true].sum()}"
    sure = both(f"这张的概率 {percent(mistake.probability * 100)} %", "probability of this one")
    words = [
        quoted(true),
        " → ",
        element("b", quoted(taken)),
        f"，{share} ",
        element("br"),
        sure,
    ]
    return element("li", picture, *words)


def _bars(confusion: "Confusion") -> Markup:
    tested = [
        (share, label)
        for share, label in zip(confusion.accuracy.per_class, confusion.labels, strict=True)
        if share is not None
    ]
    tested.sort(key=lambda one: one[0])
    more = f"，最差的 {MOST_BARS} 类 / the worst {MOST_BARS}" if len(tested) > MOST_BARS else ""
    items = (
        element(
            "li",
            quoted(label, longest=16),
            element("span", element("i", style=f"width:{share * 100:.1f}%"), class_="bar"),
            element("span", f"{percent(share * 100)} %", class_="value"),
        )
        for share, label in tested[:MOST_BARS]
    )
    heading = element("h3", both(f"各类的正确率{more}", "accuracy per class"))
    return joined([heading, element("ul", *items, class_="bars")])


# --- pairs


def pairs_section(views: Sequence["PairView"]) -> Section:
    """For each pair: the picture, where the text is found in it, and which tokens matter."""
    meaning = both(
        "右图的颜色是每个位置与这句话的余弦：在最后一层注意力里，让每个位置只看它自己，再像整张图一样投影"
        "（MaskCLIP 的做法）。模型打分时看的是整张图，训练也从未要求单个位置有意义，所以"
        "这张图只提示线索，不是模型打分的原因；颜色只在一张图内可比，从这张图的最低值到最高值。",
        "Colours: the cosine of each place with the text, each place seeing only itself in the last attention, as in "
        "MaskCLIP. The model scores the whole picture and was never trained on places, so this is a hint, not the "
        "cause of the score. Colours run from the lowest to the highest value of this one picture.",
    )
    words = both(
        "词下面的数字：去掉这个词元后，相似度下降多少。绿色有帮助，红色相反。词元之间有关联，这些数加起来不等于总分。",
        "Below each token: how much the cosine falls without it. Green helps, red hinders. Tokens depend on each "
        "other; the numbers do not add up to the score.",
    )
    notes = [element("p", note, class_="note") for note in (meaning, words)]
    return Section(
        "pairs", "一图一文：看哪里，看哪个词", "Pairs, places and tokens", joined([*notes, *map(_pair, views)])
    )


def _pair(view: "PairView") -> Markup:
    from cn_clip.report.regions import overlaid

    small = flattened(view.image)
    small.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    height, width = view.map_HW.shape
    sizes = {"side": LARGEST_SIDE, "num_bytes": VIEW_BYTES}
    original = thumbnail(small, alt="图片", **sizes)
    places = thumbnail(overlaid(small, view.map_HW), alt=f"每个位置与“{view.text[:60]}”的相似度", **sizes)
    grid = both(f"{height}×{width} 个位置", "places")
    views = element(
        "div",
        element("figure", original, element("figcaption", quoted(view.path.replace("\\", "/").rsplit("/", 1)[-1]))),
        element("figure", places, element("figcaption", grid)),
        class_="views",
    )
    low, high = (f"{value:.3f}" for value in (view.map_HW.min(), view.map_HW.max()))
    scale = [element("div", class_="scale"), element("div", element("span", low), element("span", high), class_="ends")]
    told = both(f"相似度 {view.similarity:.3f}", "cosine of picture and text")
    text = [element("h3", quoted(view.text)), element("p", told), _tokens(view)]
    return element("article", element("div", views, *scale), element("div", *text), class_="pair")


def _tokens(view: "PairView") -> Markup:
    most = max((abs(drop) for _, drop in view.tokens), default=0.0) or 1.0
    items = []
    for piece, drop in view.tokens:
        kind = "helps" if drop >= 0 else "harms"
        wash = element("i", class_="wash", style=f"opacity:{0.55 * abs(drop) / most:.2f}")
        items.append(element("li", wash, element("span", piece), element("small", f"{drop:+.3f}"), class_=kind))
    return element("ol", *items, class_="tokens")
