"""From an `Encoder` to files, here or on the Hugging Face hub: what `Encoder.save` and `Encoder.push_to_hub` do."""

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cn_clip.clip.families import folders
from cn_clip.clip.families.names import is_foreign, parse
from cn_clip.clip.families.opening import resolved
from cn_clip.clip.model import CLIP
from cn_clip.clip.weights import hub
from cn_clip.clip.weights.checkpoint import Checkpoint, read_checkpoint
from cn_clip.clip.weights.form_names import CARD_FILE, SUFFIXES, Kind, require_room
from cn_clip.clip.weights.forms import model_card, whole, write_file, write_folder
from cn_clip.errors import CheckpointError, ConfigError, DownloadError, first_sentence
from cn_clip.files import staged_folder

if TYPE_CHECKING:
    from cn_clip.clip.encoder import Encoder

_IN_MEMORY = Path("the model in memory")


def save(encoder: "Encoder", target: str | Path, *, overwrite: bool) -> Path:
    """See `Encoder.save`."""
    if not str(target):
        raise ConfigError("path: expected a file or a folder, got an empty path")
    path = Path(target).expanduser()
    kind: Kind = SUFFIXES.get(path.suffix, "sentence-transformers")
    require_room(path, kind, overwrite=overwrite, otherwise="give overwrite=True, or another path")
    if (folder := _foreign_folder(encoder)) is not None:
        if kind != "sentence-transformers":
            raise ConfigError(
                f"{path}: a model of another family is saved as a folder; give a name without {path.suffix}"
            )
        with staged_folder(path) as staged:
            _copy(encoder, folder, staged)
        return path
    model = whole(_checkpoint_of(encoder), "keep")
    if kind == "sentence-transformers":
        write_folder(path, kind, model)
    else:
        write_file(path, kind, model)
    return path


def push(
    encoder: "Encoder", repo: str, *, private: bool, message: str | None, token: str | None, revision: str | None
) -> str:
    """See `Encoder.push_to_hub`."""
    import huggingface_hub

    if hub.HUB_ID.fullmatch(repo) is None or "@" in repo:
        raise ConfigError(f"repo: expected OWNER/NAME, got {repo!r}; give a branch as revision=")
    address = hub.endpoint()
    api = huggingface_hub.HfApi(endpoint=address, token=token)
    with tempfile.TemporaryDirectory(prefix="cn_clip-") as folder:
        saved = save(encoder, Path(folder) / "model", overwrite=False)
        try:
            repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
            if api.file_exists(repo, CARD_FILE, revision=revision):  # which may be somebody's work
                (saved / CARD_FILE).unlink(missing_ok=True)
            else:
                (saved / CARD_FILE).write_text(model_card(repo.rpartition("/")[2], repo), encoding="utf-8")
            if revision is not None:
                api.create_branch(repo, branch=revision, exist_ok=True)
            done = api.upload_folder(
                repo_id=repo, folder_path=saved, commit_message=message or "Save a model", revision=revision
            )
        except Exception as error:  # the hub client raises errors of many unrelated types, which differ by version
            raise DownloadError(_not_taken(error, repo, address)) from error
    return str(done.commit_url)


def _not_taken(error: Exception, repo: str, address: str) -> str:
    """One sentence on why a hub did not take a model, and what to do."""
    import huggingface_hub.errors as errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403) or isinstance(error, errors.LocalTokenNotFoundError):
        return f"{repo}: {address} does not let you write there; `hf auth login` with a token that may write, or token="
    return f"{repo}: not taken by {address} ({first_sentence(error)}); the model is unchanged, try again"


def _checkpoint_of(encoder: "Encoder") -> Checkpoint:
    """The weights of an Encoder: of the file that it was opened from, not rounded, or those in memory."""
    opened = encoder.opened
    if opened is not None:
        root = opened.settings["download_root"]
        try:
            return read_checkpoint(hub.weight_file(opened.model, download_root=root), mapped=True)
        except CheckpointError as error:
            if encoder.backend_name == "torch":
                raise
            raise ConfigError(
                f"{opened.given}: exported files cannot be saved as a model; open the checkpoint they were made of"
            ) from error
    model = getattr(encoder.backend, "model", None)
    if not isinstance(model, CLIP):
        raise ConfigError(
            "only Chinese-CLIP can be saved, and models opened by name; this is a backend or parts of your own"
        )
    if encoder.facts.precision != "fp32":
        raise ConfigError(
            f"the weights in memory are rounded to {encoder.facts.precision}; save an Encoder of the model in fp32"
        )
    extra: dict[str, Any] = {} if model.context_length is None else {"context_length": model.context_length}
    extra |= {"matryoshka": list(model.matryoshka)} if model.matryoshka else {}
    return Checkpoint(_IN_MEMORY, dict(model.state_dict()), config=model.config, extra=extra)


def _foreign_folder(encoder: "Encoder") -> Path | None:
    """The transformers folder of a model of another family; None of Chinese-CLIP."""
    if encoder.opened is None:
        return None
    root = encoder.opened.settings["download_root"]
    name = resolved(encoder.opened.model, download_root=root)
    if not is_foreign(name):
        return None
    parsed = parse(str(name))
    if parsed.scheme != "hf":
        raise ConfigError(f"{name}: models of open_clip are not saved here; their file is {parsed.source}")
    return folders.folder_of(parsed, download_root=root)


def _copy(encoder: "Encoder", folder: Path, target: Path) -> None:
    """The files that decide on the rows, as they are."""
    assert encoder.opened is not None
    for file in folders.files_of(f"hf:{folder}", download_root=encoder.opened.settings["download_root"]):
        shutil.copyfile(file, target / file.name)
