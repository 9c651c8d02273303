"""The report's page frame, style sheet and pieces: no script, no address outside the file."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from mmedx_fast.report_data import is_number

CSS = """
:root { color-scheme: light dark;
  --bg: #fbfbfa; --card: #ffffff; --ink: #16191d; --muted: #5d646c; --line: #e1e4e8;
  --accent: #0072b2; --good: #00704f; --bad: #b04a00; --tint: #eef4f8;
  --c1: #0072b2; --c2: #d55e00; --c3: #009e73; --c4: #a8569b; --c5: #b07d00; --c6: #3f4fae; }
@media (prefers-color-scheme: dark) { :root {
  --bg: #111418; --card: #181c21; --ink: #e8eaed; --muted: #a0a7b0; --line: #2d333a;
  --accent: #5db6ea; --good: #45c79b; --bad: #f0954e; --tint: #1d2a35;
  --c1: #56b4e9; --c2: #f08a3c; --c3: #2fc79a; --c4: #d893c9; --c5: #e3b341; --c6: #98a6ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  }
main, header, footer { max-width: 1080px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 36px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 1.25rem; margin: 52px 0 6px; letter-spacing: -0.005em; }
h3 { font-size: 0.95rem; margin: 0 0 8px; }
p { margin: 6px 0 14px; max-width: 74ch; }
.sub, .muted, figcaption, footer { color: var(--muted); font-size: 0.9rem; }
a { color: var(--accent); }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 16px 0 0; padding: 10px 0;
  border-block: 1px solid var(--line); font-size: 0.92rem; }
nav a { text-decoration: none; }
nav a:hover { text-decoration: underline; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 14px;
  margin: 24px 0 0; }
.tile, figure, article, .box { background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; padding: 16px 18px; }
.tile b { display: block; font-size: 2rem; line-height: 1.15; font-weight: 650;
  letter-spacing: -0.02em; font-variant-numeric: tabular-nums; }
.tile span { color: var(--muted); font-size: 0.88rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr));
  gap: 16px; align-items: start; margin: 16px 0; }
figure { margin: 0; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; max-width: 560px; margin: 0 auto; }
figcaption { margin-top: 8px; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; margin: 16px 0; }
.scroll:focus-visible { outline: 2px solid var(--accent); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 9px 14px; text-align: right; border-top: 1px solid var(--line);
  white-space: nowrap; vertical-align: top; }
thead th { border-top: 0; color: var(--muted); font-size: 0.85rem; font-weight: 600; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: var(--card); }
tbody th { font-weight: 500; }
td small { display: block; font-weight: 400; color: var(--muted); font-size: 0.78rem; line-height:
1.2; } .narrow { max-width: 560px; }
.compact { border: 0; margin: 0; }
.compact th, .compact td { padding: 5px; font-size: 0.8rem; }
.compact tbody th { white-space: normal; line-height: 1.3; }
.compact thead th { font-size: 0.72rem; white-space: normal; vertical-align: bottom; }
tr.main th, tr.main td { background: var(--tint); }
td.best { font-weight: 700; }
article { margin: 14px 0; display: grid; grid-template-columns: 200px 1fr; gap: 4px 22px; }
article .pics { display: flex; flex-direction: column; gap: 8px; }
article img { width: 100%; border-radius: 6px; background: #000; display: block;
  image-rendering: auto; }
article > div { min-width: 0; overflow-wrap: anywhere; }
.tag { color: var(--muted); font-size: 0.82rem; overflow-wrap: anywhere; }
ul.options { margin: 6px 0 12px; padding-left: 0; list-style: none; font-size: 0.93rem; }
.right { color: var(--good); font-weight: 600; }
.wrong { color: var(--bad); font-weight: 600; }
details { border-top: 1px solid var(--line); padding: 6px 0; font-size: 0.92rem; }
details:last-child { border-bottom: 1px solid var(--line); }
summary span:first-child { margin-right: 8px; }
summary { cursor: pointer; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--bg); border-radius: 6px;
  padding: 10px 12px; margin: 8px 0 4px; font: 0.84rem/1.5 ui-monospace, Menlo, Consolas, monospace;
  }
.notyet { border: 1px dashed var(--line); border-radius: 10px; padding: 18px; color: var(--muted);
  margin: 16px 0; }
.note { border-left: 4px solid var(--bad); padding: 2px 14px; margin: 18px 0; }
footer { margin-top: 60px; padding-bottom: 40px; }
@media (max-width: 640px) {
  main, header, footer { padding-inline: 14px; }
  header { padding-top: 22px; }
  article { grid-template-columns: 1fr; }
  article .pics { flex-direction: row; }
  article .pics > * { max-width: 46%; }
  figure { padding: 12px 10px; }
  th, td { padding: 8px 10px; } }
@media print { .scroll { overflow: visible; } article, figure { break-inside: avoid; } }
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
{body}
</body>
</html>
"""


def table(heads: Iterable[str], rows: Iterable[str], caption: str, kind: str = "") -> str:
    """A table that scrolls sideways on a narrow screen; ``rows`` are finished ``<tr>``."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    name = escape(caption, quote=True)
    return (
        f'<div class="scroll {kind}" tabindex="0" role="region" aria-label="{name}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def figure(title: str, svg: str, note: str = "") -> str:
    """A card with a heading, finished content (SVG or a table) and a note."""
    caption = f"<figcaption>{escape(note)}</figcaption>" if note else ""
    return f"<figure><h3>{escape(title)}</h3>{svg}{caption}</figure>"


def not_yet(what: str) -> str:
    """What stands where a stage has left no files."""
    return f'<div class="notyet">{escape(what)}: not run yet.</div>'


def dig(value: Any, *keys: str) -> Any:
    """``value[k1][k2]...``, None where a level is missing or no dict."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def numbers(value: Any) -> dict[str, float]:
    """The finite numbers of a dict, {} for anything else."""
    if not isinstance(value, dict):
        return {}
    return {str(key): item for key, item in value.items() if is_number(item)}


def interval(value: Any) -> tuple[float, float] | None:
    """(low, high) of a pair of finite numbers, else None."""
    if isinstance(value, list | tuple) and len(value) == 2 and all(map(is_number, value)):
        return float(value[0]), float(value[1])
    return None
