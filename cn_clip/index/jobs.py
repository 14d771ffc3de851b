"""A source to bring into an index, and the index opened for it; `building` and `vectors` do the work."""

import contextlib
from collections.abc import Collection, Container, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cn_clip.clip.choice import DEFAULT_MODEL
from cn_clip.clip.encoder import Encoder
from cn_clip.clip.families.opening import full_name
from cn_clip.command import Speaker
from cn_clip.errors import ConfigError, DataError
from cn_clip.index.options import AddOptions, SourceOptions
from cn_clip.index.searching import NEW_PICTURES, made_as, open_encoder, seen_as
from cn_clip.index.sources import Location, file_id, location_of
from cn_clip.retrieval import addresses
from cn_clip.retrieval.addresses import Facts, Writer
from cn_clip.retrieval.manifest import EngineName, Manifest, ModelInfo, PictureFacts, VectorType
from cn_clip.retrieval.schemes import IndexAddress, address_of
from cn_clip.retrieval.segments import ItemId
from cn_clip.retrieval.store import same_model
from cn_clip.terminal import shown

if TYPE_CHECKING:
    from cn_clip.index.build import Options


@dataclass(frozen=True)
class Job:
    """A source to bring into an index. index: its address; engine, vector_type: None keeps what the index has.

    is_sync: the index is to hold what the source holds, and of this source nothing else. replace_source: also when that
    is another source than the last one. prune: what is gone goes also with large folders, which a disk that is away
    takes with it. renew: pictures that would be seen otherwise in a new index are computed again.
    """

    index: str
    source: Location
    engine: EngineName | None = None
    vector_type: VectorType | None = None
    id_prefix: str = ""
    is_sync: bool = False
    keep_missing: bool = False
    prune: bool = False
    replace_source: bool = False
    renew: bool = False
    milvus_config: str | None = None

    @property
    def address(self) -> IndexAddress:
        """Raises ConfigError for a faulty address."""
        return address_of(self.index, self.milvus_config)


def job_of(options: "Options") -> Job:
    """What `cn-clip index build` is to do."""
    return Job(
        options.output or "",
        location_of(options.source),
        engine=options.engine,
        vector_type=options.vector_type,
        is_sync=True,
        keep_missing=options.keep_missing,
        prune=options.prune,
        replace_source=options.replace_source,
        renew=options.renew,
        milvus_config=options.milvus_config,
    )


class Model:
    """The model of an index, opened when it is first needed, and then compared with the index."""

    def __init__(self, options: AddOptions, index: IndexAddress, say: Speaker, *, renew: bool = False) -> None:
        """renew: pictures are seen as those of a new index are, not as the index says."""
        self.options, self.index, self.say, self.renew = options, index, say, renew
        self._opened: tuple[Encoder, ModelInfo] | None = None
        self.facts: Facts | None = addresses.facts(index)
        if options.decode not in (None, self.pictures.decode):
            raise ConfigError(
                f"--decode {options.decode}: the vectors are of pictures decoded with {self.pictures.decode}, and "
                "those of both would differ; leave it out, or compute all again with index build --renew",
                at=index,
            )
        if self.facts:
            made_as(options.chosen, self.facts.model, index)
        if self.facts and options.model and full_name(options.model) != self.facts.model.name:
            self.encoder()

    def refresh(self) -> None:
        """Looks at the index anew, which others may have changed; what is open stays open for vectors of its own."""
        self.facts = addresses.facts(self.index)
        if self.facts and self._opened and self.facts.model.fingerprint != self._opened[1].fingerprint:
            self._opened = None

    @property
    def name(self) -> str:
        """Of the model that is given, else of that of the index."""
        return self.options.model or (self.facts.model.name if self.facts else "") or DEFAULT_MODEL

    def encoder(self) -> Encoder:
        """Raises ConfigError naming both models when it is not that of the index."""
        if self._opened is None:
            chosen = seen_as(replace(self.options.chosen, model=self.name), self.pictures)
            chosen = made_as(chosen, self.facts.model if self.facts else None, self.index)
            self._opened = open_encoder(chosen, self.say, kinds=["image"])
            if self.facts:
                same_model(self.facts.model, self._opened[1], self.index)
        return self._opened[0]

    @property
    def pictures(self) -> PictureFacts:
        """How the pictures of the index are seen, or those of a new one are to be."""
        if self.facts is None:
            return replace(NEW_PICTURES, decode=self.options.decode or NEW_PICTURES.decode)
        if self.renew:
            return replace(NEW_PICTURES, decode=self.options.decode or self.recorded.decode)
        return self.recorded

    @property
    def recorded(self) -> PictureFacts:
        """How the pictures of the index are seen as it says; one from before it was recorded: as they are stored."""
        return (self.facts.pictures if self.facts else None) or PictureFacts()

    def reading(self, options: SourceOptions) -> PictureFacts:
        """How the pictures are to be seen from now on."""
        had = self.facts is not None and self.facts.pictures is not None and self.facts.pictures.ocr
        return replace(self.pictures, ocr=options.ocr or (had and not options.no_ocr))

    def info(self) -> ModelInfo:
        """What the index says, or is to say, of it."""
        if self.facts is None:
            self.encoder()
            assert self._opened is not None
            return self._opened[1]
        return self.facts.model


@contextlib.contextmanager
def changing(
    job: Job,
    model: ModelInfo,
    embed_dim: int,
    name: str,
    ids: Container[ItemId],
    pictures: PictureFacts | None = None,
    *,
    few: Collection[ItemId] | None = None,
) -> Iterator[Writer]:
    """The index, new or as it is, opened for changing it; `finish` is for the end.

    embed_dim: of the vectors to be added; name, ids: of their source; pictures: of a new index, and of others whether
    words are read; None: vectors come without pictures. few: the ids, where these are so few pictures that the index is
    asked for them instead of gone through. Raises ConfigError for another model, and if items of other
    sources are in the way, DataError for vectors of another length.
    """
    engine, vector_type = job.engine or "exact", job.vector_type or "float32"
    create = Manifest(model, engine=engine, vector_type=vector_type, source=name, pictures=pictures or PictureFacts())
    with addresses.open_writer(job.address, create) as writer:
        found = writer.manifest
        if job.vector_type not in (None, found.vector_type):
            raise ConfigError(f"holds {found.vector_type} vectors; build another index for others", at=job.address)
        if found.model.fingerprint != model.fingerprint:
            same_model(found.model, model, job.address)
        if found.model.embed_dim != embed_dim:
            raise DataError(
                f"vectors of {embed_dim} numbers, the index {job.address} has those of "
                f"{found.model.name or 'a model'} of {found.model.embed_dim}",
                at=job.source,
            )
        before = found.source
        if not job.is_sync:
            for item_id, metadata in writer.items() if few is None else writer.known(few).items():
                if file_id(item_id, metadata) in ids and metadata.get("source") != name:
                    raise ConfigError(
                        f"has an item {shown(item_id)} of {shown(metadata.get('source', 'elsewhere'))}; "
                        "give --id-prefix, which goes before the ids of what is added",
                        at=job.address,
                    )
        elif not (job.keep_missing or job.replace_source or before in ("", name)):
            items = writer.items()
            old = {file_id(item_id, metadata) for item_id, metadata in items if metadata.get("source") == before}
            num_gone = sum(one not in ids for one in old)
            if 2 * num_gone > len(old):  # a folder that moved holds most of what it held; another would empty the index
                raise ConfigError(
                    f"was built from {before}, and {num_gone} of its {len(old)} items are not in {name}; "
                    "to have both, use cn-clip index add; to have the new ones alone, give --replace-source; for a "
                    "second index, give another --output",
                    at=job.address,
                )
        yield writer


def finish(writer: Writer, job: Job, name: str, pictures: PictureFacts | None = None) -> None:
    """Notes in the index what a run over all of the source `name` has made of it, and brings up its graph.

    pictures: as of `changing`.
    """
    seen = writer.manifest.pictures
    given = None
    if pictures is not None and pictures.ocr != (seen is not None and seen.ocr):
        given = replace(seen or PictureFacts(), ocr=pictures.ocr)
    writer.describe(engine=job.engine, source=name if job.is_sync else writer.manifest.source, pictures=given)
    writer.finish()
