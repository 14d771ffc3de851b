"""Prints what an index holds: `cn-clip index info photos.index`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cn_clip import command, terminal
from cn_clip.index.options import IndexArgument, MilvusConfig, execute
from cn_clip.language import both, counted
from cn_clip.option_types import Json
from cn_clip.retrieval.manifest import Manifest
from cn_clip.retrieval.schemes import address_of
from cn_clip.terminal import shown


@dataclass(frozen=True, kw_only=True)
class Options:
    """Tells the model, the engine, and how much there is of what."""

    index: IndexArgument
    milvus_config: MilvusConfig = None
    json: Json = False


def run(options: Options) -> None:
    """Prints the facts; raises DataError when there is no index."""
    from cn_clip.retrieval import addresses

    say = command.Speaker(quiet=options.json)
    facts = addresses.require(address_of(options.index, options.milvus_config))
    model, more = facts.model, dict[str, Any]()
    if isinstance(facts, Manifest):
        more = {
            "num_removed": facts.num_rows - facts.num_items,
            "has_graph": facts.graph is not None,
            "num_segments": len(facts.segments),
            "bytes": sum(file.bytes for _, file in facts.files()),
            "generation": facts.generation,
        }
    dimensions = both(f"{model.embed_dim} 维", f"{model.embed_dim} dimensions")
    seen = facts.pictures
    if seen is None:
        way = "?"
    else:
        upright = both("转正", "upright") if seen.upright else both("按原样", "as stored")
        way = f"{upright}, --decode {seen.decode}"
    graph = both("（图）", " (graph)") if more.get("has_graph") else ""
    rows = [
        (both("模型", "model"), f"{shown(model.name) or '?'} ({dimensions}, {model.fingerprint or '?'})"),
        (both("条目", "items"), str(facts.num_items)),
        (both("引擎", "engine"), f"{facts.engine}{graph}"),
        (both("向量", "vectors"), facts.vector_type),
        (both("图片", "images"), way),
        (both("来源", "source"), shown(facts.source) or "?"),
    ]
    if more:
        segments = both(f"{more['num_segments']} 段", counted(more["num_segments"], "segment"))
        rows.insert(4, (both("大小", "size"), f"{more['bytes'] / 2**20:.1f} MiB, {segments}"))
        rows.append((both("版本", "generation"), str(more["generation"])))
    for line in terminal.align(rows):
        say(line)
    say.result(
        {
            "index": options.index,
            "model": asdict(model),
            "num_items": facts.num_items,
            "engine": facts.engine,
            "vector_type": facts.vector_type,
            "pictures": None if facts.pictures is None else asdict(facts.pictures),
            "source": facts.source,
            **more,
        }
    )


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    execute(run, Options, args)


if __name__ == "__main__":
    main()
