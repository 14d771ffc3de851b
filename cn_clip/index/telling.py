"""What an index run says: what there is to do, and what came of it."""

from collections.abc import Iterator, Sequence

from cn_clip.command import Speaker
from cn_clip.index import skips
from cn_clip.index.ingest import Summary
from cn_clip.index.jobs import Job, Model
from cn_clip.index.searching import renewal_hint
from cn_clip.index.sources import Source, is_feature_file
from cn_clip.retrieval.addresses import Writer
from cn_clip.terminal import shown

LISTED = 20


def say_first(model: Model, job: Job, say: Speaker, *, source: Source, unchanged: int = 0) -> None:
    """What there is to do, before anything that takes long."""
    chosen, found, videos = model.options.chosen, len(source.candidates), len(source.videos)
    if not job.renew and model.facts and (hint := renewal_hint(model.facts.pictures, model.facts.source, job.address)):
        say.note(hint)
    say(
        f"找到 {found} 张图片{f'、{videos} 个视频' if videos else ''}，{unchanged} 个未变 / found {found} pictures"
        f"{f' and {videos} videos' if videos else ''}, {unchanged} unchanged; 模型 / model "
        f"{shown(model.name)} ({chosen.backend}, {chosen.device}, {chosen.precision}) → {job.address}"
    )
    if model.facts is None and model.pictures.decode in ("auto", "fast"):
        say(
            "比模型输入大得多的 JPEG 按缩小的尺寸解码，向量几乎不变 / JPEGs far larger than the model's input are "
            f"decoded at a fraction, and vectors hardly differ (--decode {model.pictures.decode}; exact: whole)"
        )


def say_summary(
    summary: Summary,
    writer: Writer,
    job: Job,
    say: Speaker,
    *,
    unmatched: int = 0,
    links: Sequence[tuple[str, str]] = (),
) -> None:
    """unmatched: rows of the table that name no picture of the source; links: see `sources.Source`."""
    for title, ids in (
        ("已移除 / removed", [shown(one) for one in summary.removed]),
        ("已改名 / renamed", [f"{shown(was)} → {shown(one)}" for one, was in summary.renamed]),
        ("内容重复 / duplicates", [f"{shown(one)} = {shown(other)}" for one, other in summary.duplicates]),
        ("未收录 / not indexed", [f"{shown(one.id)}: {shown(one.reason)}" for one in skips.in_order(summary.skipped)]),
    ):
        for line in listed(title, ids):
            say(line)
    for folder, gone in summary.missing.items():
        say(
            f"{shown(folder)}/ 整个不见了，它的 {len(gone)} 项留在索引里；不是硬盘没挂上，而是真的删了，就加 --prune / "
            f"is gone as a whole, and its {len(gone)} items stay; if the disk is there and it was deleted, give --prune"
        )
    if links:
        first = ", ".join(f"{shown(one)} → {shown(target)}" for one, target in links[:3])
        say(
            f"有 {len(links)} 个链接通向文件夹之外，照样收录 / links that lead out of the folder and are followed: "
            f"{len(links)} ({first}{', …' if len(links) > 3 else ''})"
        )
    if unmatched:
        say(f"表中有 {unmatched} 行没有对应图片 / rows of the table that name no picture: {unmatched}")
    new = f"新编码 / encoded {summary.encoded}, 复用 / reused {summary.reused}"
    if is_feature_file(job.source):
        new = f"新收录 / added {summary.added}"
    num_remembered = skips.num_remembered(summary.skipped)
    again = f"（{num_remembered} 个与上次一样，未再读 / as before, not read again: {num_remembered}）"
    again = again if num_remembered else ""
    if summary.videos:
        new += f", 视频 / videos {summary.videos} ({summary.frames} 帧 / frames)"
    say(
        f"{new}, 未变 / unchanged {summary.unchanged}, "
        f"移除 / removed {len(summary.removed)}, 未收录 / not indexed {len(summary.skipped)}"
        f"{': ' if summary.skipped else ''}{skips.told(summary.skipped)}{again}"
    )
    say(f"{job.address}: {len(writer)} items ({writer.manifest.engine}), {writer.manifest.model.name or '?'}")
    say.result(
        {
            "index": str(job.address),
            "num_items": len(writer),
            "encoded": summary.encoded,
            "added": summary.added,
            "reused": summary.reused,
            "unchanged": summary.unchanged,
            "videos": summary.videos,
            "frames": summary.frames,
            "removed": summary.removed,
            "duplicates": [{"id": one, "same_as": other} for one, other in summary.duplicates],
            "skipped": [one.as_dict() for one in summary.skipped],
            "skipped_by_reason": skips.counts(summary.skipped),
            "remembered": skips.num_remembered(summary.skipped),
            "renamed": [{"id": one, "was": was} for one, was in summary.renamed],
            "missing": [{"folder": folder, "items": len(ids)} for folder, ids in summary.missing.items()],
            "links_outside": [{"id": one, "target": target} for one, target in links],
            "unmatched_rows": unmatched,
            "interrupted": summary.signal is not None,
        }
    )


def listed(title: str, lines: Sequence[str]) -> Iterator[str]:
    """The lines under their title, at most LISTED of them."""
    if lines:
        yield f"{title} ({len(lines)}):"
        yield from (f"  {line}" for line in lines[:LISTED])
    if len(lines) > LISTED:
        yield f"  … 其余 {len(lines) - LISTED} 项用 --json 查看 / {len(lines) - LISTED} more, see --json"
