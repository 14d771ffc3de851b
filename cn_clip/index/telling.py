"""What an index run says: what there is to do, and what came of it."""

import sys
from collections.abc import Iterator, Sequence

from cn_clip.command import Speaker
from cn_clip.index import skips
from cn_clip.index.ingest import Summary
from cn_clip.index.jobs import Job, Model
from cn_clip.index.searching import renewal_hint
from cn_clip.index.sources import Source, is_feature_file
from cn_clip.language import both, counted, translated
from cn_clip.retrieval.addresses import Writer
from cn_clip.terminal import shown

LISTED = 20


def say_first(model: Model, job: Job, say: Speaker, *, source: Source, unchanged: int = 0) -> None:
    """What there is to do, before anything that takes long."""
    chosen, found, videos = model.options.chosen, len(source.candidates), len(source.videos)
    if not job.renew and model.facts and (hint := renewal_hint(model.facts.pictures, model.facts.source, job.address)):
        say.note(hint)
    and_videos = both(f"、{videos} 个视频", f" and {counted(videos, 'video')}") if videos else ""
    used = f"{shown(model.name)} ({chosen.backend}, {chosen.device}, {chosen.precision})"
    say(
        both(
            f"找到 {found} 张图片{and_videos}，{unchanged} 个未变；模型 {used} → {job.address}",
            f"found {counted(found, 'image')}{and_videos}, {unchanged} unchanged; model {used} → {job.address}",
        )
    )
    if model.facts is None and model.pictures.decode in ("auto", "fast"):
        say(
            both(
                "比模型输入大得多的 JPEG 按缩小的尺寸解码，向量几乎不变"
                f"（--decode {model.pictures.decode}；exact：按原尺寸）",
                "JPEGs much larger than the model's input are decoded at a fraction of their size, which hardly "
                f"changes the vectors (--decode {model.pictures.decode}; exact: at full size)",
            )
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
        (both("已移除", "removed"), [shown(one) for one in summary.removed]),
        (both("已改名", "renamed"), [f"{shown(was)} → {shown(one)}" for one, was in summary.renamed]),
        (both("内容重复", "duplicates"), [f"{shown(one)} = {shown(other)}" for one, other in summary.duplicates]),
        (both("未收录", "not indexed"), [_reason(one) for one in skips.in_order(summary.skipped)]),
    ):
        for line in listed(title, ids):
            say(line)
    for folder, gone in summary.missing.items():
        say(
            both(
                f"{shown(folder)}/ 整个不见了，它的 {len(gone)} 项留在索引里；"
                "如果不是硬盘没挂上，而是真的删了，加 --prune",
                f"{shown(folder)}/ is gone as a whole; its {counted(len(gone), 'item')} stay in the index. If the disk "
                "is mounted and the folder was deleted, give --prune",
            )
        )
    if links:
        first, more = ", ".join(f"{shown(one)} → {shown(target)}" for one, target in links[:3]), ""
        if len(links) > 3:
            more = ", …"
        say(
            both(
                f"有 {len(links)} 个链接通向文件夹之外，照样收录（{first}{more}）",
                f"followed {counted(len(links), 'link')} out of the folder ({first}{more})",
            )
        )
    if unmatched:
        say(
            both(
                f"表中有 {unmatched} 行没有对应的图片",
                f"{counted(unmatched, 'row')} of the table without an image of that name",
            )
        )
    new = both(
        f"新编码 {summary.encoded}，复用 {summary.reused}", f"encoded {summary.encoded}, reused {summary.reused}"
    )
    if is_feature_file(job.source):
        new = both(f"新收录 {summary.added}", f"added {summary.added}")
    num_remembered = skips.num_remembered(summary.skipped)
    again = both(
        f"（{num_remembered} 个与上次一样，没有再读）", f" ({num_remembered} of them as before, not read again)"
    )
    again = again if num_remembered else ""
    if summary.videos:
        new += both(
            f"，视频 {summary.videos}（{summary.frames} 帧）",
            f", videos {summary.videos} ({counted(summary.frames, 'frame')})",
        )
    say(
        both(
            f"{new}，未变 {summary.unchanged}，移除 {len(summary.removed)}，未收录 {len(summary.skipped)}"
            f"{'：' if summary.skipped else ''}",
            f"{new}, unchanged {summary.unchanged}, removed {len(summary.removed)}, not indexed {len(summary.skipped)}"
            f"{': ' if summary.skipped else ''}",
        )
        + f"{skips.told(summary.skipped)}{again}"
    )
    say(f"{job.address}: {_items(len(writer))} ({writer.manifest.engine}), {writer.manifest.model.name or '?'}")
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


def refuse_interrupted(summary: Summary, job: Job, *, num_items: int) -> None:
    """Ends with 128 and the number of the signal that came, if one came."""
    if summary.signal is None:
        return
    print(
        both(
            f"已中断，完成的都已保存（{job.address}，{num_items} 项）；再运行同一条命令就接着做",
            f"interrupted; what was done is kept ({job.address}, {counted(num_items, 'item')}). Run the same "
            "command again to go on",
        ),
        file=sys.stderr,
    )
    raise SystemExit(128 + summary.signal)


def _items(number: int) -> str:
    return both(f"{number} 项", counted(number, "item"))


def _reason(one: skips.Skipped) -> str:
    return f"{shown(one.id)}: {shown(translated(one.reason))}"


def listed(title: str, lines: Sequence[str]) -> Iterator[str]:
    """The lines under their title, at most LISTED of them."""
    if lines:
        yield f"{title} ({len(lines)}):"
        yield from (f"  {line}" for line in lines[:LISTED])
    if len(lines) > LISTED:
        more = len(lines) - LISTED
        yield both(f"  … 其余 {more} 项用 --json 查看", f"  … {more} more, see --json")
