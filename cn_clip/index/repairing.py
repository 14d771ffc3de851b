"""What `cn-clip index check` does: finds damage, and makes what is damaged again from other files and from pictures."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cn_clip.command import Speaker
from cn_clip.errors import CnClipError, ConfigError, DataError
from cn_clip.index import skips
from cn_clip.index.ingest import Ingest, Settings
from cn_clip.index.jobs import Model
from cn_clip.index.options import AddOptions
from cn_clip.index.origins import Origins
from cn_clip.index.progress import Progress
from cn_clip.index.sources import Candidate
from cn_clip.index.telling import listed
from cn_clip.language import both, counted, translated
from cn_clip.retrieval import inspection
from cn_clip.retrieval.inspection import Damage
from cn_clip.retrieval.manifest import Manifest
from cn_clip.retrieval.schemes import address_of
from cn_clip.retrieval.segments import ItemId
from cn_clip.retrieval.writer import NewItem, open_writer
from cn_clip.terminal import shown

_UNCHANGED = (
    "nothing was changed: see that the disk is there and repair again; a file that can never be read again counts as "
    "gone once it is moved away"
)


@dataclass
class Result:
    """What became of a repair.

    lost: items that are gone; num_nameless: those of which not even the id is left; num_bare: those kept whose
    thumbnails are gone; remaining: damage that is still there; aside: the index as it was before.
    """

    num_items: int = 0
    lost: list[ItemId] = field(default_factory=list)
    num_nameless: int = 0
    num_bare: int = 0
    remaining: list[Damage] = field(default_factory=list)
    aside: Path | None = None


def check(index: str, options: AddOptions, say: Speaker, *, also_repair: bool, keep_aside: bool) -> int:
    """Says what is damaged, and repairs it if `also_repair`; returns 1 if something stays damaged or is lost, else 0.

    Raises ConfigError for an address of a server, and as `repair`.
    """
    folder = address_of(index)
    if not isinstance(folder, Path):
        raise ConfigError(f"{folder.store} looks after its own files; this command is for folders", at=folder)
    facts, found = inspection.inspect(folder)
    for damage in found:
        say(both("损坏：", "damaged: ") + f"{folder / damage.path}: {translated(damage.reason)}")
    result = Result(facts.num_items, remaining=found)
    if found and also_repair:
        result = repair(options, folder, facts, found, say, keep_aside=keep_aside)
    elif found:
        say(both("用 --repair 修复", "--repair mends what can be mended"))
    else:
        if also_repair:  # removes what a killed writer left
            with contextlib.suppress(CnClipError), open_writer(folder) as writer:
                writer.upgrade()
        say(
            both(
                f"完好：{folder}，{facts.num_items} 项",
                f"no problems found: {folder}, {counted(facts.num_items, 'item')}",
            )
        )
    num_lost = len(result.lost) + result.num_nameless
    say.result(
        {
            "index": index,
            "num_items": result.num_items,
            "damaged": [{"path": one.path, "reason": one.reason} for one in found],
            "repaired": bool(found and also_repair),
            "remaining": [{"path": one.path, "reason": one.reason} for one in result.remaining],
            "lost": result.lost,
            "num_lost": num_lost,
            "num_without_thumbnails": result.num_bare,
            "kept_aside": str(result.aside) if result.aside else None,
        }
    )
    return int(bool(result.remaining) or num_lost > 0)


def repair(
    options: AddOptions, folder: Path, facts: Manifest, found: Sequence[Damage], say: Speaker, *, keep_aside: bool
) -> Result:
    """Repairs in one step: until it is done, the index is as it was. Raises CnClipError when it cannot be.

    keep_aside: segments that it takes away stay in an index of their own. What cannot be read just now, a file of the
    index or a picture, is not gone: nothing is changed then, and DataError names it.
    """
    unread = next((damage for damage in found if damage.is_unread), None)
    if unread is not None:
        raise DataError(f"{unread.reason}; {_UNCHANGED}", at=folder / unread.path)
    inspection.require_removed(folder, facts, found)
    names = {segment.name for segment in facts.segments} & {one.owner for one in found if not one.is_derived}
    derived = [one.path for one in found if one.is_derived and one.owner not in names]
    rescued = _rescue(folder, facts, names, found)
    result, model = rescued.result, Model(options, folder, say)
    with open_writer(folder, without=names) as writer:
        if writer.manifest.generation != facts.generation:
            raise ConfigError("another process has changed this index meanwhile; repair it again", at=folder)
        # All goes into one commit, with which the damaged segments cease to count.
        settings = Settings(options.batch_size, options.num_workers, None, options.thumbnail_size)
        ingest = Ingest(writer, model.encoder, settings, Progress())
        ingest.keep(rescued.ready.values())
        ingest.read(rescued.pictures)
        not_now = (one for one in ingest.summary.skipped if not one.is_gone or one.kind.startswith(skips.WITHOUT))
        if away := next(not_now, None):
            raise DataError(f"{shown(away.id)}: {away.reason}; {_UNCHANGED}")
        if names and keep_aside:
            result.aside = writer.keep_aside()
        ingest.commit()
        result.lost += [one.id for one in ingest.summary.skipped if one.id not in rescued.ready]
        writer.upgrade(derived)
        writer.finish()
        result.num_items = len(writer)
        result.num_bare = sum(not item.thumbnail for one in rescued.bare for item in writer.stored([one]).values())
    result.remaining = inspection.inspect(folder)[1]
    _say(result, folder, facts, say)
    return result


@dataclass
class _Rescued:
    """Items that can be kept as they are, and pictures to compute again; those of both are kept if that fails.

    bare: items whose thumbnails can only be made again.
    """

    ready: dict[ItemId, NewItem] = field(default_factory=dict)
    pictures: list[Candidate] = field(default_factory=list)
    bare: list[ItemId] = field(default_factory=list)
    result: Result = field(default_factory=Result)


def _rescue(folder: Path, facts: Manifest, names: set[str], found: Sequence[Damage]) -> _Rescued:
    rescued, sources = _Rescued(), Origins()
    for name in sorted(names):
        damaged = {damage.path.partition("/")[2] for damage in found if damage.owner == name}
        part = inspection.remains(folder, facts, name, damaged)
        rescued.result.num_nameless += part.num_lost
        rescued.bare += part.bare
        for item in part.items:
            vector_D, picture = (None, None) if item.id in part.whole else sources.find(item.id, item.metadata)
            if picture is not None:
                rescued.pictures.append(picture)
            if vector_D is not None:
                rescued.ready[item.id] = replace(item, vector_D=vector_D)
            elif item.id in part.with_vectors:
                rescued.ready[item.id] = item
            elif picture is None:
                rescued.result.lost.append(item.id)
    return rescued


def _say(result: Result, folder: Path, facts: Manifest, say: Speaker) -> None:
    for line in listed(both("丢失", "lost"), [shown(item_id) for item_id in result.lost]):
        say(line)
    for damage in result.remaining:
        path, reason = folder / damage.path, translated(damage.reason)
        say(
            both(
                f"修不好：{path}: {reason}；请在另一个文件夹重建索引",
                f"beyond repair: {path}: {reason}; build the index again in another folder",
            )
        )
    nameless = both(
        f"，{result.num_nameless} 项连编号也丢了", f", {counted(result.num_nameless, 'item')} of unknown id lost"
    )
    bare = both(f"，{result.num_bare} 项的缩略图丢了", f", {counted(result.num_bare, 'item')} without a thumbnail now")
    done = both("部分修复", "partly repaired") if result.remaining else both("已修复", "repaired")
    say(
        both(f"{done}：{folder}，{result.num_items} 项", f"{done}: {folder}, {counted(result.num_items, 'item')}")
        + f"{nameless if result.num_nameless else ''}{bare if result.num_bare else ''}"
    )
    if result.aside is not None:
        say(
            both(
                f"修复前的索引，确认无误后可以删除：{result.aside}",
                f"the index as it was, which can be deleted once this one proves right: {result.aside}",
            )
        )
    if result.lost or result.num_nameless:
        say(
            both("再次运行可补回仍在的图片：", "to bring back the images that still exist: ")
            + f"cn-clip index build {facts.source}"
        )
