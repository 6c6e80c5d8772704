# SPDX-License-Identifier: Apache-2.0
"""Pieces of the report's pages: escaping, pictures as data URIs, the frame with its style.

A page loads nothing and runs nothing: no script, no link to a server; its links lead to the other
pages of the report. Everything that comes from data or from a model's folder goes through `text`.
"""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from vlm2vec_jax.data.mmeb import to_input
from vlm2vec_jax.data.paths import IMAGE_FOLDERS, SEPARATOR, unsafe_path
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.images import load_image
from vlm2vec_jax.inputs import IMAGE_MARKER

THUMBNAIL = 176
"""Longest side of a picture, in pixels; smaller ones are kept as they are."""

GENERATOR = '<meta name="generator" content="vlm2vec_jax">'
"""In the head of every page, by which a page of ours is known again."""

# The second layer behind escaping: even markup that slipped through could not load or run.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

STYLE = """
:root { --ink:#1f2933; --muted:#616e7c; --line:#e4e7eb; --soft:#f5f7fa; --right:#2f855a;
  --wrong:#c53030; --accent:#0b69a3; }
* { box-sizing:border-box; }
body { margin:0; color:var(--ink); background:#fff; font:15px/1.5 system-ui, "Segoe UI", Roboto,
  "Helvetica Neue", "DejaVu Sans", sans-serif; }
main { max-width:1080px; margin:0 auto; padding:2rem 1.25rem 4rem; }
h1 { font-size:1.7rem; margin:0 0 .25rem; letter-spacing:-.01em; }
h2 { font-size:1.2rem; margin:2.5rem 0 .75rem; padding-top:1rem; border-top:1px solid var(--line); }
h3 { font-size:1rem; margin:1.6rem 0 .5rem; }
p, .muted { color:var(--muted); margin:.25rem 0; }
a { color:var(--accent); text-decoration:none; }
a:hover { text-decoration:underline; }
table { border-collapse:collapse; width:100%; font-size:.9rem; font-variant-numeric:tabular-nums; }
th, td { padding:.35rem .6rem; border-bottom:1px solid var(--line); text-align:left; }
th { color:var(--muted); font-weight:600; font-size:.8rem; }
td.n, th.n { text-align:right; white-space:nowrap; }
tr.mean td { font-weight:600; background:var(--soft); }
td.up { color:var(--right); }
td.down { color:var(--wrong); }
.scroll { overflow-x:auto; }
.tiles { display:grid; grid-template-columns:repeat(auto-fit, minmax(118px, 1fr)); gap:.6rem;
  margin:1.25rem 0; }
.tile { background:var(--soft); border-radius:8px; padding:.7rem .85rem; }
.tile b { display:block; font-size:1.45rem; line-height:1.25; }
.tile span { color:var(--muted); font-size:.8rem; display:block; }
img.chart { width:100%; height:auto; display:block; }
.query { border:1px solid var(--line); border-left:5px solid var(--right); border-radius:8px;
  padding:.75rem; margin:.75rem 0; display:grid; grid-template-columns:200px 1fr; gap:1rem; }
.query.bad { border-left-color:var(--wrong); }
.query > * { min-width:0; }
.verdict { font-weight:600; color:var(--right); font-size:.8rem; margin-bottom:.4rem; }
.bad .verdict { color:var(--wrong); }
.before { color:var(--muted); font-size:.8rem; }
.targets { display:grid; grid-template-columns:repeat(auto-fill, minmax(112px, 1fr)); gap:.5rem;
  align-content:start; }
.target { border:2px solid var(--line); border-radius:6px; padding:.4rem; font-size:.8rem;
  background:#fff; }
.target.right { border-color:var(--right); background:#f0faf4; }
.target.wrong { border-color:var(--wrong); background:#fff5f5; }
.tag { display:block; font-weight:600; font-size:.68rem; letter-spacing:-.01em;
  color:var(--muted); margin-bottom:.3rem; }
.right .tag { color:var(--right); }
.wrong .tag { color:var(--wrong); }
.words { overflow-wrap:anywhere; white-space:pre-line; margin-top:.3rem; }
img.pic { display:block; width:100%; max-width:176px; max-height:112px; object-fit:contain;
  object-position:left; border-radius:4px; }
img.small { image-rendering:pixelated; }
.lost { color:var(--muted); font-style:italic; overflow-wrap:anywhere; }
p.pages { margin:.75rem 0; font-size:.9rem; }
@media (max-width:640px) { .query { grid-template-columns:1fr; } }
"""


def text(value: object) -> str:
    """Escape anything for use between tags and inside quoted attributes."""
    return html.escape(str(value), quote=True)


def quoted(name: str) -> str:
    """A file's name as a part of a relative link."""
    return PurePosixPath(f"/{name}").as_uri().removeprefix("file:///")


def link(address: str, words: str) -> str:
    """A link to a place whose parts are `quoted`."""
    return f'<a href="{text(address)}">{text(words)}</a>'


def page(title: str, body: str) -> str:
    """The whole document around a body."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{GENERATOR}'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def chart(svg: str, words: str) -> str:
    """An SVG drawing as an image, in which no script of it could run; `words` describe it."""
    data = base64.b64encode(svg.encode()).decode()
    return f'<img class="chart" alt="{text(words)}" src="data:image/svg+xml;base64,{data}">'


def table(
    head: list[str],
    rows: list[tuple[str, list[str]]],
    left: int = 1,
    marks: list[list[str]] | None = None,
    links: Mapping[str, str] | None = None,
) -> str:
    """A table of cells that are escaped here.

    Args:
      head: column titles.
      rows: (class of the row, cells).
      left: how many columns are words; the others are numbers.
      marks: class of each cell of each row, `up` or `down` or none.
      links: first cell of a row -> where it leads.
    """

    def cells(tag: str, values: list[str], kinds: list[str] | None = None) -> str:
        out = []
        for k, v in enumerate(values):
            kind = f"{'n' if k >= left else ''} {kinds[k] if kinds else ''}".strip()
            leads = links.get(v) if links and tag == "td" and not k else None
            shown = link(leads, v) if leads else text(v)
            out.append(f'<{tag} class="{text(kind)}">{shown}</{tag}>')
        return "".join(out)

    body = "".join(
        f'<tr class="{text(kind)}">{cells("td", row, marks[n] if marks else None)}</tr>'
        for n, (kind, row) in enumerate(rows)
    )
    return f'<div class="scroll"><table><tr>{cells("th", head)}</tr>{body}</table></div>'


class Pictures:
    """Thumbnails of a data folder's images as data URIs, each made once."""

    def __init__(self, image_root: str | os.PathLike | None):
        root = None if image_root is None else Path(image_root)
        self.root = root.parent if root is not None and root.is_file() else root
        self.made: dict[str, str] = {}

    def show(self, name: str) -> str:
        """An `<img>` of an image as the data names it, or a line that says why there is none."""
        if name not in self.made:
            self.made[name] = self._make(name)
        return self.made[name]

    def _make(self, name: str) -> str:
        return "".join(self._one(part) for part in name.split(SEPARATOR))

    def _one(self, name: str) -> str:
        if self.root is None:
            return f'<div class="lost">{text(name)}</div>'
        try:
            image = load_image(to_input(("", name), self._root_of(name)).images[0])
        except (UserError, OSError) as error:
            return f'<div class="lost">no picture: {text(error)}</div>'
        small = max(image.size) <= 96
        image = image.copy()
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        out = io.BytesIO()
        image.save(out, "PNG" if small else "JPEG", **({} if small else {"quality": 82}))
        kind = "png" if small else "jpeg"
        data = base64.b64encode(out.getvalue()).decode()
        return (
            f'<img class="pic{" small" if small else ""}" alt="{text(name)}" '
            f'src="data:image/{kind};base64,{data}">'
        )

    def _root_of(self, name: str) -> Path:
        """The folder that holds an image: the root itself, or one that data folders have in it."""
        assert self.root is not None
        if unsafe_path(name):
            return self.root
        roots = (self.root, *(self.root / folder for folder in IMAGE_FOLDERS))
        return next((root for root in roots if (root / name).is_file()), self.root)

    def item(self, value: dict[str, str]) -> str:
        """A query or a target: its picture, and its text without the image marker."""
        parts = [self.show(value["image"])] if value.get("image") else []
        words = IMAGE_MARKER.sub("", value.get("text", "")).strip()
        if words:
            parts.append(f'<div class="words">{text(words)}</div>')
        return "".join(parts)
