"""From what the command names to what is served: indexes by their names, and the models of their vectors, each once."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from cn_clip import command, zoo
from cn_clip.clip.choice import DEFAULT_MODEL, Choice
from cn_clip.clip.encoder import Encoder
from cn_clip.clip.marks import cut_in, merged_in
from cn_clip.clip.templates import read_labels
from cn_clip.errors import ConfigError
from cn_clip.index.searching import NEW_PICTURES, made_as, model_of, open_encoder, renewal_hint, seen_as
from cn_clip.retrieval.addresses import Searchable, open_index
from cn_clip.retrieval.schemes import addresses_of
from cn_clip.retrieval.store import same_model
from cn_clip.serve.batching import Metrics
from cn_clip.serve.collections import Collections, Opened
from cn_clip.serve.limits import Limits
from cn_clip.serve.runner import Runner


def open_all(
    addresses: Sequence[str],
    *,
    chosen: Choice,
    limits: Limits,
    model: str | None,
    name: str | None,
    metrics: Metrics,
    milvus_config: str | None = None,
) -> tuple[list[Runner], Collections]:
    """(the models, which are opened when they are started; the indexes); raises CnClipError.

    model: of all indexes; None for the own of each, and the default without any. name: of the one model in requests.
    """
    indexes = [open_index(one, is_served=True) for one in addresses_of(addresses, milvus_config)]
    names = [index_name(index.address) for index in indexes]
    for index, called in zip(indexes, names, strict=True):
        if names.count(called) > 1:
            raise ConfigError(
                f"{index.address}: another index is called {called!r} too, as requests would name it; rename one"
            )
    # Two indexes of one model share it if they see pictures alike.
    groups: dict[object, list[Searchable]] = {}
    for index in indexes:
        fingerprint = index.model.fingerprint
        groups.setdefault(
            (model or fingerprint, merged_in(fingerprint), cut_in(fingerprint), index.pictures), []
        ).append(index)
    if name is not None and len(groups) > 1:
        raise ConfigError(f"--name {name}: the indexes have {len(groups)} models; leave it out")
    runners, opened = list[Runner](), dict[int, Runner]()
    for group in list(groups.values()) or [[]]:
        wanted = model_of(group[0], model) if group else model or DEFAULT_MODEL
        called = _unused(name or served_name(wanted), [runner.name for runner in runners])
        opening = partial(open_model, replace(chosen, model=wanted), group)
        runners.append(Runner(called, opening, limits, metrics))
        opened.update((id(index), runners[-1]) for index in group)
    served = [
        Opened(called, index, opened[id(index)], is_first=index is indexes[0])
        for called, index in zip(names, indexes, strict=True)
    ]
    return runners, Collections(served)


def _unused(name: str, taken: Sequence[str]) -> str:
    """The name, or name-2, name-3 and so on: two files of one name may hold different models."""
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}-{number}"
    return found


def served_name(model: str) -> str:
    """A name for a model: that of a file or folder without where it lies."""
    return model if zoo.named(model) else Path(model.removeprefix("hf:")).stem


def index_name(address: str) -> str:
    """What an index is called in requests: photos for data/photos.index, photos.db, and milvus://HOST:PORT/photos."""
    return Path(address).stem


def read_label_sets(paths: Sequence[Path]) -> dict[str, list[str]]:
    """Labels by the name of their file; raises DataError for a faulty file, ConfigError for two of one name."""
    found = {path.stem: read_labels(path) for path in paths}
    if len(found) < len(paths):
        raise ConfigError(f"--label-sets: expected files of different names, got {', '.join(map(str, paths))}")
    return found


def open_model(chosen: Choice, indexes: Sequence[Searchable]) -> Encoder:
    """The open model; raises ConfigError for another one than that of the indexes."""
    seen = seen_as(chosen, indexes[0].pictures if indexes else NEW_PICTURES)
    for index in indexes:
        seen = made_as(seen, index.model, index.address)
    say = command.Speaker(quiet=False)
    encoder, facts = open_encoder(seen, say)
    for index in indexes:
        same_model(index.model, facts, index.address)
        if hint := renewal_hint(index.pictures, index.source, index.address):
            say.note(hint)
    return encoder
