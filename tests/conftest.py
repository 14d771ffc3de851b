"""What all test files share, to be quick: a tower is translated to ONNX once a process; nothing waits for disks."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from cn_clip.clip.backends import export

if TYPE_CHECKING:
    from onnx import ModelProto

    from cn_clip.clip.backends.base import Kind
    from cn_clip.clip.model import CLIP


@pytest.fixture(scope="session", autouse=True)
def translations_kept() -> Iterator[None]:
    """Only the translation by PyTorch is kept, by its weights; what is made of it and measured on it is done anew."""
    kept: dict[tuple[str, str, object], bytes] = {}
    translated = export._translated

    def translated_once(model: "CLIP", kind: "Kind") -> "ModelProto":
        from onnx import ModelProto

        key = (model.fingerprint(), kind, model.config)
        if key not in kept:
            kept[key] = translated(model, kind).SerializeToString()
        return ModelProto.FromString(kept[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_translated", translated_once)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_disks() -> Iterator[None]:
    """Tests survive no power cut. The commands that they start in processes of their own do wait."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield
