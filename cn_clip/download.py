"""Downloads a published model, or checks the one that is here: `cn-clip download ViT-B-16`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cn_clip import command, spelling, zoo
from cn_clip.errors import ConfigError, DownloadError
from cn_clip.language import both
from cn_clip.option_types import Json


@dataclass(frozen=True)
class Options:
    """Downloads a published model, going on where an interrupted download stopped, and checks its SHA-256.

    A file that is here already is checked only. HF_ENDPOINT names a mirror of Hugging Face.
    """

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")]
    """One of those that `cn-clip models` lists"""
    hub: Literal["huggingface", "modelscope"] = "huggingface"
    """Where from; modelscope needs pip install 'cn-clip-next[modelscope]'"""
    download_root: Path = zoo.DOWNLOAD_ROOT
    """Folder of the file"""
    offline: bool = False
    """Ask nothing of the network; say what to fetch elsewhere, and where to put it"""
    json: Json = False

    def __post_init__(self) -> None:
        if zoo.named(self.name) is None:
            known = zoo.available_models()
            hint = spelling.meant(self.name, known)
            raise ConfigError(f"{self.name}: no such model; expected one of {', '.join(known)}{hint}")


def run(options: Options) -> None:
    """Downloads or checks the file; raises DownloadError with the next step."""
    from cn_clip.clip.weights import hub

    say = command.Speaker(quiet=options.json)
    entry = zoo.named(options.name)
    assert entry is not None
    if isinstance(entry, zoo.Bundled):
        path, is_new, is_published = entry.path, False, None
        say(both(f"随包附带，不用下载：{path}", f"comes with this package, nothing to download: {path}"))
    else:
        use_modelscope = options.hub == "modelscope"
        is_new = not os.path.isfile(options.download_root.expanduser() / entry.filename)
        if is_new and not options.offline:
            url = hub.url_of(entry, use_modelscope=use_modelscope)
            say.note(both(f"下载 {url}", f"downloading {url}"))
        path = hub.download(entry, options.download_root, use_modelscope=use_modelscope, offline=options.offline)
        # Also what was not here before: while this process waited, another one may have put it there, or a person.
        is_published = hub.is_published_file(entry, path)
        if is_published is False and not use_modelscope:
            raise DownloadError(
                f"is not the published file, whose SHA-256 is {entry.sha256}; move it away and download again, "
                "or use it by its path",
                at=path,
            )
        verdict = {
            True: both("SHA-256 相符", "SHA-256 matches"),
            False: both("SHA-256 与 Hugging Face 上的不同", "SHA-256 differs from that on Hugging Face"),
            None: both("没有可比的 SHA-256", "no known SHA-256 to compare with"),
        }[is_published]
        done = both("已下载", "downloaded") if is_new else both("已在本机", "already here")
        size = path.stat().st_size
        say(both(f"{done}：{path}（{size:,} 字节；{verdict}）", f"{done}: {path} ({size:,} bytes; {verdict})"))
    result = {"name": options.name, "path": str(path), "num_bytes": path.stat().st_size}
    say.result({**result, "downloaded": is_new, "checked": is_published is True})


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
