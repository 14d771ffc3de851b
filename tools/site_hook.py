"""What mkdocs.yml hangs into the building of the two sites: the repository's own layout, and nothing from other hosts.

A page lies in the site where its file lies in the repository, README.md being the home page. So one relative link is
right on GitHub, in a checkout and in the site, and a fact needs one page only. The English site lies in en/ of the
Chinese one and has its pages, docs/en/NAME.md, under the same addresses: docs/search.html and en/docs/search.html.
"""

import logging
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).resolve().parents[1]
HOME = {"zh": "README.md", "en": "README_En.md"}
ENGLISH = "docs/en/"
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
# The line under the title that leads to the page in the other language: on GitHub. The site has a switch.
OTHER_LANGUAGE = re.compile(r"\A(# .*\n\n)\[(?:English|中文)\]\([^)]*\)\n\n")
# What a browser fetches by itself, from another host.
FETCHED = re.compile(
    r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?https?:[^>]*|<link[^>]*\shref=["']?https?:[^>]*"""
)
NOT_FETCHED = ("canonical", "alternate")


def linked(start: list[Path]) -> list[Path]:
    """The files that pages of docs/ and README lead to, and the notes among these in turn; each once."""
    found = list(start)
    for page in found:
        if page.suffix == ".md":
            text = OTHER_LANGUAGE.sub(r"\1", page.read_text(encoding="utf-8"))
            targets = [(page.parent / link).resolve() for link in LINK.findall(text)]
            found += [path for path in dict.fromkeys(targets) if path.is_file() and path not in found]
    return found


def language(config: MkDocsConfig) -> str:
    """Of the site that is being built: "zh" or "en"."""
    return str(config.theme["language"])


def address(name: str, language: str) -> str:
    """Where a file of the repository lies in the site of a language, a page still with its ending .md."""
    if name == HOME[language]:
        return "index.md"
    return f"docs/{name.removeprefix(ENGLISH)}" if language == "en" and name.startswith(ENGLISH) else name


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Puts the pages of docs/ under docs/, and beside it what they link to in the rest of the repository."""
    logging.getLogger("jieba").setLevel(logging.WARNING)  # it tells how it reads its dictionary
    site = language(config)
    theme = [file for file in files if file.src_dir != config.docs_dir]
    pages = {name: sorted((ROOT / "docs" / ("" if name == "zh" else name)).glob("*.md")) for name in HOME}
    found = linked([ROOT / HOME[site], *pages.pop(site)])
    others = [path for paths in pages.values() for path in paths]
    return Files(theme + [_file(path, config) for path in found if path not in others])


def _file(path: Path, config: MkDocsConfig) -> File:
    name = path.relative_to(ROOT).as_posix()
    file = File.generated(config, name, abs_src_path=str(path))
    file.dest_uri = re.sub(r"\.md$", ".html", address(name, language(config)))
    return file


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: object) -> str:
    """Leaves the way to the other language to the switch of the site; notes in both languages lead to its pages."""
    if language(config) == "en" and not page.file.src_uri.startswith((ENGLISH, HOME["en"])):
        markdown = re.sub(r"\]\(((?:\.\./)*)docs/(?=[\w-]+\.md)", rf"](\1{ENGLISH}", markdown)
    return OTHER_LANGUAGE.sub(r"\1", markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Points the language switch at this page in both sites; refuses what would make a browser ask another host."""
    output = switched(output, page.file.dest_uri, language(config))
    fetched = [tag for tag in FETCHED.findall(output) if not any(word in tag for word in NOT_FETCHED)]
    if fetched:
        raise PluginError(f"{page}: the site is to work offline, but would fetch {fetched[0]}")
    return output


def on_post_template(output_content: str, template_name: str, config: MkDocsConfig) -> str:
    """The page for addresses that lead nowhere has the switch as well; it leads home."""
    return switched(output_content, "index.html", language(config)) if template_name == "404.html" else output_content


def on_post_build(config: MkDocsConfig) -> None:
    """Refuses an English site with a page that the Chinese one, built before it, lacks."""
    if language(config) == "en":
        site = Path(config.site_dir)
        pages = [path.relative_to(site) for path in site.rglob("*.html")]
        lacking = [str(page) for page in pages if not (site.parent / page).is_file()]
        if lacking:
            raise PluginError(f"The language switch leads nowhere from {', '.join(lacking)}")


def switched(output: str, page: str, language: str) -> str:
    """A page whose links `#zh` and `#en` of the switch lead to the same page of that site.

    "docs/search.html" of the Chinese site has "../en/docs/search.html" for `#en` and "search.html" for `#zh`.
    """
    here = {"zh": "", "en": "en/"}
    for other, folder in here.items():
        target = get_relative_url(f"{folder}{page}", f"{here[language]}{page}")
        output = re.sub(rf'href="?#{other}"?(?=[ >])', f'href="{target}"', output)
    return output


def on_config(config: MkDocsConfig) -> Any:
    """The two languages of the switch; their links are set page by page."""
    config.extra["alternate"] = [
        {"name": "中文", "link": "#zh", "lang": "zh"},
        {"name": "English", "link": "#en", "lang": "en"},
    ]
    return config
