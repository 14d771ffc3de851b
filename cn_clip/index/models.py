"""Opens the model of an index, and says what an index records of it; for the commands of this package and `serve`."""

from collections.abc import Sequence

from cn_clip.clip.backends.base import KINDS, Kind
from cn_clip.clip.choice import Choice
from cn_clip.clip.encoder import Encoder
from cn_clip.clip.opening import fingerprint, full_name, open_quietly
from cn_clip.command import Speaker
from cn_clip.retrieval.manifest import ModelInfo


def open_encoder(chosen: Choice, say: Speaker, *, kinds: Sequence[Kind] = KINDS) -> tuple[Encoder, ModelInfo]:
    """The towers wanted, and their model; raises as `clip.opening.open_encoder`."""
    encoder = open_quietly(chosen, say, kinds=kinds, with_fingerprint=True)
    return encoder, ModelInfo(full_name(chosen.model), fingerprint(chosen, encoder), encoder.embed_dim)
