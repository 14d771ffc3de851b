"""What mkdocs.yml hangs into the building of the site: the repository's own layout, and nothing from other hosts.

A page lies in the site where its file lies in the repository, README.md being the home page. So one relative link is
right on GitHub, in a checkout and in the site, and a fact needs one page only.
"""

import logging
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
HOME = ("README.md", "README_En.md")
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
# What a browser fetches by itself, from another host.
FETCHED = re.compile(
    r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?https?:[^>]*|<link[^>]*\shref=["']?https?:[^>]*"""
)
NOT_FETCHED = ("canonical", "alternate")


def linked(start: list[Path]) -> list[Path]:
    """The files that pages lead to, and the pages among these in turn; those that are there, each once."""
    found = list(start)
    for page in found:
        if page.suffix == ".md":
            targets = [(page.parent / link).resolve() for link in LINK.findall(page.read_text(encoding="utf-8"))]
            found += [path for path in dict.fromkeys(targets) if path.is_file() and path not in found]
    return found


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Puts the files of docs/ under docs/, and beside it what they link to in the rest of the repository."""
    logging.getLogger("jieba").setLevel(logging.WARNING)  # it tells how it reads its dictionary
    docs = Path(config.docs_dir)
    theme = [file for file in files if file.src_dir != config.docs_dir]
    pages = [ROOT / name for name in HOME] + sorted(path for path in docs.rglob("*") if path.is_file())
    return Files(
        theme
        + [
            File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path))
            for path in linked(pages)
            if path.is_relative_to(ROOT)
        ]
    )


def on_post_page(output: str, page: object, config: MkDocsConfig) -> str:
    """Refuses a page that would make a browser ask another host."""
    fetched = [tag for tag in FETCHED.findall(output) if not any(word in tag for word in NOT_FETCHED)]
    if fetched:
        raise PluginError(f"{page}: the site is to work offline, but would fetch {fetched[0]}")
    return output
