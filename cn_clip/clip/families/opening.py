"""From `hf:…` or `open_clip:…` to the parts of an `Encoder`: what `Encoder` and the commands call."""

from typing import TYPE_CHECKING

from cn_clip import ranks
from cn_clip.clip.backends.base import BackendName, check_precision
from cn_clip.clip.families import names, snapshots
from cn_clip.clip.transforms import Decode

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from cn_clip.clip.backends.base import Parts


def open_parts(
    name: str,
    *,
    backend: BackendName = "torch",
    precision: str = "fp32",
    device: "str | torch.device | None" = None,
    num_threads: int | None = None,
    download_root: "str | Path | None" = None,
    decode: Decode = "exact",
) -> "Parts":
    """The towers, the picture transform and the tokenizer of a model of another family.

    name: `hf:FOLDER`, a transformers folder or an id of the Hugging Face hub; `open_clip:ARCHITECTURE@FILE`, or a tag
    instead of the file. device: default CUDA where there is one. download_root: where downloads are kept.
    Raises CnClipError: no such model, a family that is not known, or a package that is not installed.
    """
    names.check(name, backend)
    check_precision("torch", precision)
    parsed = names.parse(name)
    chosen = ranks.choose_device(device)
    if parsed.scheme == "hf":
        from cn_clip.clip.families.hf_models import open_folder

        folder = snapshots.folder_of(parsed, download_root=download_root)
        return open_folder(folder, device=chosen, precision=precision, num_threads=num_threads, decode=decode)
    from cn_clip.clip.families.open_clip_models import open_model

    return open_model(
        parsed,
        device=chosen,
        precision=precision,
        num_threads=num_threads,
        download_root=download_root,
        decode=decode,
    )
