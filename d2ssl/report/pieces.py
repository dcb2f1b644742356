"""Pieces of HTML that our pages are put together from, and the page around them.

A page is one file that needs no other: pictures are in it. Text is escaped here and nowhere else;
what a function returns is HTML, and so is ``content`` that is given to one.
"""

import base64
import html
import io
from typing import Iterable, List, Sequence, Tuple

import numpy as np
from PIL import Image

from d2ssl.atomic import atomic_open

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2127; --soft: #5d6570; --line: #dfe3e8;
  --card: #f6f7f9; --bar: #cfe1f5; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181d; --ink: #e4e7ec; --soft: #9aa3af; --line: #323842; --card: #1d2127;
    --bar: #274869; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 66rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-top: .75rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p { margin: .5rem 0; max-width: 46rem; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; margin: 1rem 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem; text-align: right; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.main { font-weight: 700; }
table:not(.words) td { white-space: nowrap; }
table.dense { font-size: .85rem; }
table.dense th, table.dense td { padding: .35rem .5rem; vertical-align: top; white-space: normal; }
.words th, .words td { text-align: left; vertical-align: top; }
.words td + td { overflow-wrap: anywhere; min-width: 6rem; }
td.bar { min-width: 7rem; background: linear-gradient(to right,
  var(--bar) var(--share), transparent 0) 0 50% / 100% 70% no-repeat; }
figure { margin: 0; }
img { max-width: 100%; height: auto; display: block; }
.grid { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.grid img { width: 100%; }
.one { max-width: 44rem; }
.scroll img { max-width: none; border-radius: 4px; }
.photos { display: grid; gap: 1rem; }
.photos img { border-radius: 4px; }
.sheet { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); }
.sheet img { width: 100%; border-radius: 4px; }
figcaption { margin: .3rem 0; overflow-wrap: anywhere; }
details { margin: 1rem 0; }
summary { cursor: pointer; }
pre { background: var(--card); padding: .8rem; overflow-x: auto; font-size: .85rem; }
@media (max-width: 32rem) { th, td { padding: .35rem .3rem; font-size: .9rem; }
  dl { font-size: .9rem; } }
"""


def write_page(path: str, title: str, sections: Iterable[str]) -> None:
    """Write a page; sections that are empty are left out."""
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(filter(None, sections))
        + "\n</body>\n</html>\n"
    )
    with atomic_open(path, "wb") as file:
        file.write(page.encode(errors="replace"))  # a file name need not be text


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def heading(text: str, level: int = 1) -> str:
    return f"<h{level}>{html.escape(text)}</h{level}>"


def line(text: str) -> str:
    return f'<p class="soft">{html.escape(text)}</p>'


def paragraph(text: str, strong: str = "") -> str:
    """Louder than a line, and louder still what is ``strong``, in front."""
    strong = f"<strong>{html.escape(strong)}</strong> " if strong else ""
    return f"<p>{strong}{html.escape(text)}</p>"


def block(kind: str, *content: str) -> str:
    """
    Args:
        kind: "photos": wide ones, one under another; "sheet": small ones in rows; "grid": plots in
            rows; "one": a plot alone; "scroll": what may be wider than the page.
    """
    return f'<div class="{kind}">{"".join(content)}</div>'


def facts(rows: Sequence[Tuple[str, object]]) -> str:
    cells = (f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in rows)
    return f"<dl>{''.join(cells)}</dl>"


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], main: int = -1, kind: str = ""
) -> str:
    """
    Args:
        main: column of the figure that matters most.
        kind: "words" where cells hold text rather than numbers, "dense" where they are many.
    """
    out = _header(head)
    for row in rows:
        cells = (
            f"<td{' class=main' if i == main else ''}>{html.escape(cell)}</td>"
            for i, cell in enumerate(row)
        )
        out += f"<tr>{''.join(cells)}</tr>"
    return block("scroll", f'<table class="{kind}">{out}</table>')


def _header(head: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr>"


def bars(head: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A name and then numbers a row, each with a bar as long as its share of the column's most."""
    most = [max(column) or 1 for column in list(zip(*rows))[1:]]
    out = _header(head)
    for name, *numbers in rows:
        cells = (
            f'<td class="bar" style="--share: {100 * number / top:.1f}%">{number}</td>'
            for number, top in zip(numbers, most)
        )
        out += f"<tr><td>{html.escape(name)}</td>{''.join(cells)}</tr>"
    return block("scroll", f"<table>{out}</table>")


def folded(summary: str, *content: str) -> str:
    return f"<details><summary>{html.escape(summary)}</summary>{''.join(content)}</details>"


def verbatim(text: str) -> str:
    """As it was typed, line by line."""
    return f"<pre>{html.escape(text)}</pre>"


def plots(figures: List[Tuple[str, bytes]]) -> str:
    out = ""
    for caption, svg in figures:
        if svg:
            image = _data_image(svg, "image/svg+xml", caption)
            out += f"<figure><figcaption>{html.escape(caption)}</figcaption>{image}</figure>"
    return block("grid", out)


def figure(image: np.ndarray, caption: str) -> str:
    """A picture, H x W x 3 uint8 RGB, with what it shows under it."""
    drawn = picture(Image.fromarray(image), caption)
    return f"<figure>{drawn}<figcaption>{html.escape(caption)}</figcaption></figure>"


def picture(image: Image.Image, alt: str) -> str:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90, subsampling=0)
    return _data_image(file.getvalue(), "image/jpeg", alt)


def _data_image(content: bytes, kind: str, alt: str) -> str:
    data = base64.b64encode(content).decode("ascii")
    return f'<img alt="{html.escape(alt)}" src="data:{kind};base64,{data}">'
