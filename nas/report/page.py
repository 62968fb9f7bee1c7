"""The frame of an HTML page: style sheet, script, and how its parts are put together. Knows nothing of runs.

The page asks nothing of any other place: no fonts, no scripts, no pictures from elsewhere. Start with `page` and `section`.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

CSS = """
:root{color-scheme:light dark;--paper:#fffffe;--ink:#1f2630;--muted:#66707c;--grid:#dfe3e8;--soft:#f4f6f8;--link:#0a5c9c;
--blue:#0072b2;--good:#1a7f37;--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--paper:#15191e;--ink:#e4e8ed;--muted:#9aa5b1;--grid:#2f3740;--soft:#1d2228;
--link:#7cc0f5;--blue:#3598dc;--good:#57c27a;--bad:#ff8a80}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.55 system-ui,-apple-system,"Segoe UI","DejaVu Sans",sans-serif}
main,header,footer{max-width:1080px;margin:0 auto;padding:0 24px}
header{padding-top:34px}
h1{font-size:28px;line-height:1.2;margin:0 0 4px}
h2{font-size:20px;margin:46px 0 8px;padding-top:14px;border-top:1px solid var(--grid)}
h3{font-size:15px;margin:22px 0 6px}
p{margin:6px 0;max-width:96ch}
a{color:var(--link)}
.sub,.note,footer{color:var(--muted)}
.note{font-size:13px}
nav{margin:14px 0 0;font-size:14px}
nav a{margin-right:16px;text-decoration:none;white-space:nowrap}
ul.facts{padding:14px 18px 14px 34px;margin:18px 0 0;background:var(--soft);border-radius:8px}
ul.facts li{margin:4px 0}
figure{margin:14px 0 4px;overflow-x:auto}
figure>svg{display:block;max-width:100%;height:auto}
figure.chart>svg{width:100%;max-width:860px}
figure.wide>svg{max-width:none}
figure.tall{max-height:640px;overflow:auto;border:1px solid var(--grid);border-radius:8px;padding:8px}
figure.half{display:inline-block;width:49.4%;vertical-align:top}
.scroll{overflow-x:auto;max-height:620px;overflow-y:auto}
table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:600;padding:6px 0}
th,td{padding:4px 12px 4px 0;text-align:left;vertical-align:top;white-space:nowrap}
th{position:sticky;top:0;background:var(--paper);border-bottom:1.5px solid var(--muted);font-weight:600}
td{border-bottom:1px solid var(--grid)}
th.n,td.n{text-align:right}
td.wrap{white-space:normal;word-break:break-word}
tr.good td:first-child{font-weight:700;color:var(--good)}
tr.bad td{color:var(--bad)}
tr.dim td{color:var(--muted)}
table.sortable th{cursor:pointer;user-select:none}
th[aria-sort=ascending]::after{content:" \\2191"}
th[aria-sort=descending]::after{content:" \\2193"}
details{margin:10px 0;border:1px solid var(--grid);border-radius:8px;padding:0 14px}
details[open]{padding-bottom:12px}
summary{cursor:pointer;padding:9px 0;font-weight:600}
summary span{font-weight:400;color:var(--muted)}
pre{background:var(--soft);border-radius:8px;padding:12px 14px;overflow-x:auto;
font:12.5px/1.5 ui-monospace,"DejaVu Sans Mono",monospace}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(420px,1fr));gap:0 30px}
.pair>div{min-width:0}
footer{margin-top:60px;padding-bottom:40px;font-size:13px}
@media print{.scroll,figure.tall{max-height:none}details{break-inside:avoid}}
"""

SCRIPT = """
document.querySelectorAll("table.sortable").forEach(function(table){
  var heads=table.tHead.rows[0].cells, body=table.tBodies[0];
  Array.prototype.forEach.call(heads,function(head,column){
    function key(row){var cell=row.cells[column],s=cell.getAttribute("data-s");return s===null?cell.textContent:s}
    head.tabIndex=0;
    function sort(){
      var up=head.getAttribute("aria-sort")!=="ascending";
      Array.prototype.forEach.call(heads,function(other){other.removeAttribute("aria-sort")});
      head.setAttribute("aria-sort",up?"ascending":"descending");
      var rows=Array.prototype.slice.call(body.rows);
      rows.sort(function(a,b){
        var x=key(a),y=key(b),p=parseFloat(x),q=parseFloat(y),none=function(v){return v===""||v==="\\u2013"};
        if(none(x)||none(y))return none(x)-none(y);
        var order=isNaN(p)||isNaN(q)?x.localeCompare(y):p-q;
        return up?order:-order;
      });
      rows.forEach(function(row){body.appendChild(row)});
    }
    head.addEventListener("click",sort);
    head.addEventListener("keydown",function(event){if(event.key==="Enter")sort()});
  });
});
"""


def text(value: object) -> str:
    """Anything, as text that is safe inside an element or an attribute."""
    return html.escape(str(value), quote=True)


def page(title: str, head: str, sections: Sequence[tuple[str, str, str]], foot: str) -> str:
    """A whole page.

    Args:
        title: plain text.
        head: HTML under the title.
        sections: (anchor, heading in plain text, HTML); empty ones are left out.
        foot: HTML at the end.
    """
    kept = [part for part in sections if part[2]]
    links = "".join(f'<a href="#{text(anchor)}">{text(heading)}</a>' for anchor, heading, _ in kept)
    body = "".join(section(*part) for part in kept)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none';style-src 'unsafe-inline';"
        "script-src 'unsafe-inline';img-src data:\">"
        f"<title>{text(title)}</title><style>{CSS}</style></head><body>\n"
        f"<header><h1>{text(title)}</h1>{head}<nav>{links}</nav></header>\n<main>{body}</main>\n"
        f"<footer>{foot}</footer><script>{SCRIPT}</script></body></html>\n"
    )


def section(anchor: str, heading: str, body: str) -> str:
    """A heading with an anchor and what stands under it."""
    return f'<section id="{text(anchor)}"><h2>{text(heading)}</h2>\n{body}</section>\n'


def paragraphs(sentences: Sequence[str]) -> str:
    """One paragraph for each plain text."""
    return "".join(f"<p>{text(sentence)}</p>" for sentence in sentences)


def facts(sentences: Sequence[str]) -> str:
    """A list that stands out."""
    return f'<ul class="facts">{"".join(f"<li>{text(sentence)}</li>" for sentence in sentences)}</ul>'


def figure(svg: str, kind: str = "chart") -> str:
    """A picture; `kind` "chart" fills the width, "tall" scrolls inside its frame, "wide" is not shrunk."""
    return f'<figure class="{text(kind)}">{svg}</figure>'


def fold(summary: str, aside: str, body: str, *, opened: bool = False) -> str:
    """Something folded under a line: `summary` strong, `aside` pale, both plain text."""
    state = " open" if opened else ""
    return f"<details{state}><summary>{text(summary)} <span>{text(aside)}</span></summary>{body}</details>"


def pre(content: str) -> str:
    """Text as it is, with its line breaks."""
    return f"<pre>{text(content)}</pre>"


def key_values(values: Sequence[tuple[str, object]]) -> str:
    """A table of two columns."""
    rows = "".join(f'<tr><td>{text(key)}</td><td class="wrap">{text(value)}</td></tr>' for key, value in values)
    return f"<table><tbody>{rows}</tbody></table>"
