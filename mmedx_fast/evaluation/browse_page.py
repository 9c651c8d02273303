"""The browsing page's frame, style and script. Whatever comes from data or model is JSON that the script puts in
as text, never as markup."""

from __future__ import annotations

import base64
import hashlib
import json
from html import escape
from typing import Any

from mmedx_fast.report_html import CSS

_CSS = """
form { display: flex; flex-wrap: wrap; gap: 10px 14px; margin: 18px 0 8px; align-items: end; }
form label { display: flex; flex-direction: column; font-size: 0.8rem; color: var(--muted); gap: 3px; }
form label.wide { flex: 1 1 220px; }
form label[hidden] { display: none; }
select, input, button { font: inherit; font-size: 0.92rem; color: var(--ink); background: var(--card);
  border: 1px solid var(--line); border-radius: 7px; padding: 6px 9px; }
button { cursor: pointer; }
button:disabled { opacity: 0.45; cursor: default; }
.pager { display: flex; gap: 12px; align-items: center; margin: 12px 0; flex-wrap: wrap; }
.none { color: var(--muted); font-weight: 600; }
p.stem { white-space: pre-wrap; overflow-wrap: anywhere; }
.scroll td, .scroll th { padding-block: 6px; }
"""

_SCRIPT = """
'use strict';
const data = JSON.parse(document.getElementById('data').textContent);
const PAGE = 20, $ = id => document.getElementById(id);
const MARK = {right: '\\u2713 right', wrong: '\\u2717 wrong', unparsed: '\\u2013 no answer'};
const KIND = {right: 'right', wrong: 'wrong', unparsed: 'none'};
const FILTERS = ['set', 'model', 'specialty', 'outcome', 'guideline'];
let found = data.rows, at = 0;

function add(parent, tag, text, kind) {
  const made = document.createElement(tag);
  if (text !== undefined && text !== null) made.textContent = text;
  if (kind) made.className = kind;
  parent.append(made);
  return made;
}
function words(row) {
  if (row.words === undefined) {
    const options = Object.values(row.options || {});
    row.words = [row.id, row.question, row.answer, row.predicted || '', row.completion, ...options]
      .join('\\n').toLowerCase();
  }
  return row.words;
}
function fill(name) {
  const values = [...new Set(data.rows.map(row => row[name] ?? 'none'))];
  if (name !== 'set' && name !== 'model') values.sort();
  const box = $(name);
  add(box, 'option', 'all').value = '';
  for (const value of values) add(box, 'option', String(value).replaceAll('_', ' ')).value = value;
  if (values.length < 2) box.parentElement.hidden = true;
}
function filter() {
  const wanted = FILTERS.map(name => [name, $(name).value]).filter(([, value]) => value !== '');
  const text = $('search').value.trim().toLowerCase();
  found = data.rows.filter(row =>
    wanted.every(([name, value]) => String(row[name] ?? 'none') === value)
    && (!text || words(row).includes(text)));
  at = 0;
  show();
}
function option(list, row, letter, text) {
  const gold = letter === row.answer_label || (!row.answer_label && text === row.answer);
  const said = letter === row.predicted;
  const note = (gold ? ' \\u2190 answer' : '') + (said && !gold ? ' \\u2190 given' : '');
  add(list, 'li', letter + '. ' + text + note, gold ? 'right' : said ? 'wrong' : '');
}
function pictures(box, row) {
  const images = data.images[row.set + '/' + row.id];
  if (!images) {
    add(box, 'span', row.pictures ? row.pictures + ' image(s), not in this page' : 'no image', 'muted');
    return;
  }
  images.forEach((source, number) => {
    if (!source.startsWith('data:image/jpeg;base64,')) { add(box, 'p', source, 'muted'); return; }
    const image = add(box, 'img');
    image.src = source;
    image.loading = 'lazy';
    image.alt = 'Image ' + (number + 1) + ' of question ' + row.id;
  });
}
function answer(box, outcome, head, text, open) {
  const details = add(box, 'details');
  details.open = open;
  const summary = add(details, 'summary');
  add(summary, 'span', MARK[outcome], KIND[outcome]);
  add(summary, 'span', head);
  add(details, 'pre', text);
}
function article(row) {
  const made = document.createElement('article');
  pictures(add(made, 'div', null, 'pics'), row);
  const body = add(made, 'div');
  add(body, 'div', [row.set, row.specialty, row.id].filter(Boolean).join(' \\u00b7 ').replaceAll('_', ' '), 'tag');
  add(body, 'p', row.question, 'stem');
  if (row.options) {
    const list = add(body, 'ul', null, 'options');
    for (const [letter, text] of Object.entries(row.options)) option(list, row, letter, text);
  } else add(body, 'p', 'Answer: ' + row.answer, 'right');
  const votes = row.votes ? ', votes ' + Object.entries(row.votes).map(v => v[0] + ' ' + v[1]).join(', ') : '';
  const head = row.model + (row.guideline ? ', ' + row.guideline : '') + ': '
    + (row.predicted ?? 'no answer found') + votes + (row.finish === 'length' ? ' (cut by length)' : '');
  answer(body, row.outcome, head, row.completion, false);
  for (const s of row.samples) {
    const outcome = s.correct ? 'right' : s.predicted === null ? 'unparsed' : 'wrong';
    answer(body, outcome, (s.guideline || 'sample') + ': ' + (s.predicted ?? 'no answer found'), s.completion, false);
  }
  if (row.more) add(body, 'p', row.more + ' further answers in predictions.jsonl', 'muted');
  return made;
}
function show() {
  $('rows').replaceChildren(...found.slice(at, at + PAGE).map(article));
  const last = Math.min(at + PAGE, found.length);
  const said = found.length ? (at + 1) + '\\u2013' + last + ' of ' + found.length + ' answers' : 'No answer fits.';
  for (const box of document.querySelectorAll('.pager')) {
    box.querySelector('.where').textContent = said;
    box.querySelector('.back').disabled = at === 0;
    box.querySelector('.next').disabled = last >= found.length;
  }
}
function move(by) {
  at = Math.max(0, at + by * PAGE);
  show();
  $('top').scrollIntoView();
}
FILTERS.forEach(fill);
for (const name of FILTERS) $(name).addEventListener('change', filter);
let waiting = 0;
$('search').addEventListener('input', () => { clearTimeout(waiting); waiting = setTimeout(filter, 150); });
$('filters').addEventListener('submit', event => { event.preventDefault(); filter(); });
for (const box of document.querySelectorAll('.back')) box.addEventListener('click', () => move(-1));
for (const box of document.querySelectorAll('.next')) box.addEventListener('click', () => move(1));
show();
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
  style-src 'unsafe-inline'; script-src 'sha256-{digest}'">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<header><h1>{title}</h1><p class="sub">Questions and answers, right and wrong.{left_out}</p></header>
<main>
{counts}
<noscript><p>This page needs JavaScript to show the answers.</p></noscript>
<form id="filters">{filters}<label class="wide">search<input id="search" type="search"
  placeholder="question, options, answer, id"></label></form>
<div id="top"></div>
{pager}
<section id="rows" aria-live="polite"></section>
{pager}
</main>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""

_PAGER = (
    '<div class="pager"><button type="button" class="back">Back</button><span class="where"></span>'
    '<button type="button" class="next">Next</button></div>'
)
_FILTERS = {"set": "data set", "model": "model", "specialty": "specialty"} | {
    "outcome": "right or wrong",
    "guideline": "guideline",
}


def page(title: str, data: dict[str, Any]) -> str:
    """The page for ``rows``, ``counts`` (of all questions, by model and set) and ``images`` (data addresses by
    ``set/id``)."""
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    held = {key: data[key] for key in ("rows", "images")}
    # "<" could end the script element or open a comment in it.
    text = json.dumps(held, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    filters = "".join(
        f'<label>{label}<select id="{name}"></select></label>' for name, label in _FILTERS.items()
    )
    return _PAGE.format(
        digest=digest,
        title=escape(title),
        css=CSS + _CSS,
        left_out=escape(_left_out(data)),
        counts=_counts(data["counts"]),
        filters=filters,
        pager=_PAGER,
        data=text,
        script=_SCRIPT,
    )


def _left_out(data: dict[str, Any]) -> str:
    shown = sum(count["shown"] for count in data["counts"])
    total = sum(count["questions"] for count in data["counts"])
    pictured = {f"{row['set']}/{row['id']}" for row in data["rows"] if row["pictures"]}
    text = ""
    if shown < total:
        text = (
            f" {shown:,} of {total:,} answers are in this page, a fixed sample of the questions; the other "
            f"{total - shown:,} are in predictions.jsonl, and the table counts all."
        )
    if len(data["images"]) < len(pictured):
        text += f" Images are in it for {len(data['images']):,} of {len(pictured):,} questions that have some."
    return text


def _counts(counts: list[dict[str, Any]]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(count["model"])}</th><td>{escape(count["set"])}</td>'
        f"<td>{count['questions']:,}</td><td>{count['right']:,}</td><td>{count['wrong']:,}</td>"
        f"<td>{count['unparsed']:,}</td><td>{_share(count)}</td></tr>"
        for count in counts
    )
    heads = ("model", "data set", "questions", "right", "wrong", "no answer", "accuracy %")
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Counts"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _share(count: dict[str, Any]) -> str:
    return f"{100 * count['right'] / count['questions']:.1f}" if count["questions"] else "–"
