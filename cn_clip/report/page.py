"""The frame of the report: head, style sheet, contents; nothing in it is fetched from anywhere, and nothing runs."""

from collections.abc import Sequence
from typing import NamedTuple

from cn_clip import __version__
from cn_clip.report.markup import Markup, both, element, joined, quoted

# Holds even if a string got past the escaping: no script, no request.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --tint: #f5f7f9; --rule: #dde2e8; --ink: #1b2430; --faint: #5d6875;
  --blue: #1f6fb4; --red: #c63d4f; --green: #16804a; --amber: #b36b00; --violet: #5b3a9e; --lilac: #9a7fd1; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181d; --tint: #1d232a; --rule: #343c46; --ink: #e6eaef;
  --faint: #a0abb8; --blue: #6db3f2; --red: #ff8592; --green: #5fd394; --amber: #f0b04d; --violet: #c3a6ff;
  --lilac: #8f7cc0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.6 system-ui, -apple-system, "Segoe UI",
  "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "Source Han Sans SC", sans-serif; overflow-wrap: anywhere; }
main, header, footer { max-width: 1080px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 36px; }
h1 { font-size: 30px; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 22px; margin: 52px 0 10px; padding-top: 14px; border-top: 2px solid var(--ink); }
h3 { font-size: 17px; margin: 30px 0 8px; }
p { margin: 8px 0; max-width: 46em; }
.en { color: var(--faint); font-size: .86em; font-weight: 400; }
.note { color: var(--faint); font-size: 14px; }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: 4px 20px; padding: 0; margin: 14px 0 0; }
a { color: var(--blue); }
code { font: .88em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: var(--tint); padding: 1px 4px;
  border-radius: 4px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; padding: 0;
  margin: 18px 0; list-style: none; }
.figures li { background: var(--tint); border-radius: 10px; padding: 12px 16px; }
.figures b { display: block; font-size: 25px; line-height: 1.25; font-variant-numeric: tabular-nums; }
.figures span.what { font-size: 14px; }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: 2px 18px; margin: 14px 0; font-size: 15px; }
dl.facts dt { color: var(--faint); } dl.facts dd { margin: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 26px 34px;
  margin: 22px 0; }
figure { margin: 0; }
.chart figcaption { font-weight: 600; font-size: 15px; margin-bottom: 4px; }
.legend { display: flex; flex-wrap: wrap; gap: 0 16px; font-weight: 400; font-size: 13.5px; color: var(--faint); }
.legend b { color: var(--ink); font-variant-numeric: tabular-nums; }
.key { display: inline-block; width: 16px; height: 3px; border-radius: 2px; background: currentColor;
  vertical-align: middle; margin-right: 6px; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit; fill: var(--faint); }
.tick { font-size: 13px; font-variant-numeric: tabular-nums; }
.grid { stroke: var(--rule); } .axis { stroke: var(--faint); }
.line { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round; } .dot { fill: currentColor; }
.blue { color: var(--blue); } .red { color: var(--red); } .green { color: var(--green); }
.amber { color: var(--amber); } .violet { color: var(--violet); } .lilac { color: var(--lilac); }
.raw { color: var(--blue); opacity: .28; } .line.raw { stroke-width: 1; }
.dashed.line { stroke-dasharray: 6 4; }
.chance { color: var(--faint); } .line.chance { stroke-dasharray: 2 4; stroke-width: 1.5; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 4px 12px; border-bottom: 1px solid var(--rule); white-space: nowrap; }
tbody th, thead tr:first-child > :first-child { text-align: left; padding-left: 0; }
th[scope=colgroup] { text-align: center; }
thead th { color: var(--faint); font-weight: 600; }
tr.best td, tr.best th { color: var(--green); font-weight: 700; }
details { margin: 14px 0; } summary { cursor: pointer; color: var(--blue); }
.settings { columns: 300px; column-gap: 30px; font-size: 14px; padding: 0; list-style: none; }
.settings li { break-inside: avoid; }
.query { border-top: 1px solid var(--rule); padding: 12px 0 14px; break-inside: avoid; }
.query h4 { margin: 0 0 8px; font-size: 16px; font-weight: 600; }
.query h4 .rank { font-weight: 400; font-size: 14px; color: var(--faint); margin-left: 10px; }
.hits { display: grid; grid-template-columns: repeat(auto-fill, minmax(146px, 1fr)); gap: 12px; padding: 0; margin: 0;
  list-style: none; }
.shot { font-size: 13px; color: var(--faint); text-align: center; font-variant-numeric: tabular-nums; }
.shot img { display: block; width: 100%; height: 118px; object-fit: contain; background: #fff;
  border-radius: 8px; border: 1px solid var(--rule); margin-bottom: 3px; }
.shot.right img { border-color: var(--green); box-shadow: 0 0 0 2px var(--green); }
.shot.right { color: var(--green); font-weight: 700; }
.shot.own { border-left: 2px dashed var(--faint); padding-left: 10px; }
.matrix { margin: 14px 0; overflow-x: auto; } .paper { fill: var(--tint); }
svg .right { fill: var(--green); } svg .wrong { fill: var(--red); }
.matrix .name { font-size: 12.5px; } .matrix .count { font-size: 13px; text-anchor: middle; fill: var(--ink); }
.matrix .count.over { fill: var(--paper); }
.mistakes { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 16px; padding: 0;
  list-style: none; }
.mistakes img { display: block; width: 100%; height: 120px; object-fit: contain; background: #fff;
  border: 1px solid var(--rule); border-radius: 8px; margin-bottom: 4px; }
.mistakes li { font-size: 14px; break-inside: avoid; }
.bars { columns: 280px; column-gap: 34px; padding: 0; list-style: none; font-size: 14px; }
.bars li { display: grid; grid-template-columns: 6.5em 1fr 3.6em; gap: 8px; align-items: center; break-inside: avoid;
  padding: 2px 0; }
.bars .value { text-align: right; font-variant-numeric: tabular-nums; }
.bar { height: 9px; background: var(--tint); border-radius: 5px; overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--blue); }
.pair { border-top: 1px solid var(--rule); padding: 16px 0; display: grid; gap: 14px 30px;
  grid-template-columns: minmax(min(100%, 400px), 470px) minmax(0, 1fr); break-inside: avoid; }
@media (max-width: 760px) { .pair { grid-template-columns: minmax(0, 1fr); } }
.pair h3 { margin-top: 0; }
.views { display: grid; grid-template-columns: 1fr 1fr; gap: 14px; } .views img { width: 100%; height: auto;
  border: 1px solid var(--rule); border-radius: 8px; } .views figcaption { font-size: 13px; color: var(--faint); }
.scale { height: 10px; border-radius: 5px; margin: 6px 0 2px;
  background: linear-gradient(90deg, #440154, #3b528b, #21918c, #5ec962, #fde725); }
.ends { display: flex; justify-content: space-between; font-size: 13px; color: var(--faint);
  font-variant-numeric: tabular-nums; }
.tokens { display: flex; flex-wrap: wrap; gap: 6px; padding: 0; margin: 8px 0; list-style: none; }
.tokens li { text-align: center; border-radius: 6px; padding: 3px 8px; background: var(--tint); position: relative;
  overflow: hidden; font-size: 18px; line-height: 1.35; }
.tokens li > * { position: relative; }
.tokens small { display: block; font-size: 12px; font-variant-numeric: tabular-nums; }
.tokens .wash { position: absolute; inset: 0; background: currentColor; }
.helps .wash { color: var(--green); } .harms .wash { color: var(--red); }
.more { background: var(--tint); border-radius: 10px; padding: 6px 22px 10px; margin: 48px 0 0; }
.more h2 { border: 0; margin: 6px 0; font-size: 18px; }
footer { color: var(--faint); font-size: 14px; padding-top: 26px; padding-bottom: 36px; }
@media (max-width: 480px) { body { font-size: 15px; } main, header, footer { padding-left: 16px; padding-right: 16px; }
  h1 { font-size: 25px; } dl.facts { grid-template-columns: 1fr; } dl.facts dd { margin-bottom: 6px; }
  .tick { font-size: 15px; } .hits { grid-template-columns: repeat(3, 1fr); } .shot img { height: 88px; }
  th, td { padding: 4px 7px; } tbody th .en { display: block; } }
@media print { :root { color-scheme: light; --paper: #fff; --tint: #f5f7f9; --rule: #dde2e8; --ink: #000; --faint: #444;
  --blue: #1f6fb4; --red: #c63d4f; --green: #16804a; --amber: #b36b00; --violet: #5b3a9e; --lilac: #9a7fd1; }
  body { font-size: 11pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; } nav, .more { display: none; }
  main, header, footer { max-width: none; padding: 0; } }
"""


class Section(NamedTuple):
    """A part of the page with a heading; `anchor` is its place in links."""

    anchor: str
    chinese: str
    english: str
    body: Markup


def page(title: str, subtitle: Markup, sections: Sequence[Section], missing: Sequence[Markup]) -> str:
    """The whole document. missing: what other flags would add."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="generator", content=f"cn_clip {__version__}"),
        element("title", f"{title} · cn-clip 报告"),
        element("style", Markup(STYLE)),
    )
    links = [element("li", element("a", both(one.chinese, one.english), href=f"#{one.anchor}")) for one in sections]
    top = element(
        "header",
        element("h1", quoted(title)),
        element("p", subtitle, class_="note"),
        element("nav", element("ul", *links), aria_label="目录 / contents") if len(links) > 1 else "",
    )
    parts = [
        element("section", element("h2", both(one.chinese, one.english), id=one.anchor), one.body) for one in sections
    ]
    end = element("footer", both(f"由 cn-clip {__version__} 生成，单个文件，不联网。", "One file; it fetches nothing."))
    body = element("body", top, element("main", *parts, _more(missing)), end)
    return joined([Markup("<!DOCTYPE html>\n"), element("html", head, body, lang="zh-CN"), "\n"])


def _more(missing: Sequence[Markup]) -> Markup:
    if not missing:
        return Markup("")
    heading = element("h2", both("还可以加上", "What else this page can hold"))
    return element("aside", heading, element("ul", *(element("li", one) for one in missing)), class_="more")
