# SPDX-License-Identifier: Apache-2.0
"""Shows what a search has found: in the terminal with pictures, or as a page of HTML."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from typing import Any

from vlm2vec_jax.embedding.search import Hit
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.evaluation.html import page as whole_page
from vlm2vec_jax.evaluation.html import text as escaped
from vlm2vec_jax.images import load_image
from vlm2vec_jax.inputs import IMAGE_MARKER, MultimodalInput

THUMBNAIL = 240
"""Longest side of a picture on a page, in pixels."""
_COLUMNS = 24
"""Width of a picture in the terminal, in characters."""


def name_of(hit: Hit) -> str:
    """How a hit is called: its id, else its image, else the number of its row."""
    row = hit.row
    images = row.get("images") or []
    return str(row.get("id") or (images[0] if images else f"row {row['row']}"))


def words_of(hit: Hit) -> str:
    """Its text without the markers of images."""
    return IMAGE_MARKER.sub("", hit.row.get("text") or "").strip()


def can_draw(console: Any) -> bool:
    """Whether a console is a terminal that shows colours."""
    return bool(console.is_terminal and not console.is_dumb_terminal and console.color_system)


def print_hits(console: Any, hits: Sequence[Hit]) -> None:
    """List hits, with pictures where the terminal has any way to show them.

    That is Kitty's protocol or Sixel, asked of the terminal by `textual-image`; else half blocks.
    """
    from rich.markup import escape
    from rich.table import Table

    pictures = can_draw(console)
    table = Table.grid(padding=(0, 2))
    for rank, hit in enumerate(hits, 1):
        words = f"{rank:>3}  {hit.score:.4f}  {escape(_plain(name_of(hit)))}"
        said = _plain(words_of(hit))
        words += f"\n\n{escape(said[:300])}" if said else ""
        images = (hit.row.get("images") or []) if pictures else []
        table.add_row(words, *(_drawn(images[0]) for _ in images[:1]))
    console.print(table)


def _plain(text: str) -> str:
    """Text that cannot steer the terminal: control characters become spaces."""
    return "".join(c if c.isprintable() else " " for c in text)


def _drawn(path: str) -> Any:
    from textual_image.renderable import HalfcellImage, UnicodeImage
    from textual_image.renderable import Image as Best

    # Asked without a terminal of its own, the library falls back to characters without colour.
    Drawn = HalfcellImage if Best is UnicodeImage else Best
    try:
        return Drawn(load_image(path), width=_COLUMNS, height="auto")
    except (UserError, OSError):
        return "(no picture)"


def page(query: MultimodalInput, hits: Sequence[Hit], index: str) -> str:
    """A page of HTML that needs nothing but itself.

    Args:
      query: what was searched for.
      hits: what was found, best first.
      index: where, in words.
    """
    asked = "".join(_picture(image) for image in query.images)
    text = IMAGE_MARKER.sub("", query.text).strip()
    found = "".join(
        f'<div class="target"><span class="tag">{rank}. &nbsp; {hit.score:.4f}</span>'
        f"{''.join(_picture(image) for image in hit.row.get('images') or [])}"
        f'<div class="words">{escaped(words_of(hit)[:1000])}</div>'
        f'<div class="lost">{escaped(name_of(hit))}</div></div>'
        for rank, hit in enumerate(hits, 1)
    )
    body = (
        f'<h1>Search</h1><p>{len(hits)} nearest in {escaped(index)}</p><div class="query">'
        f'<div>{asked}<div class="words">{escaped(text)}</div></div>'
        f'<div class="targets">{found}</div></div>'
    )
    return whole_page("Search", body)


def _picture(source: Any) -> str:
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else "image"
    try:
        image = load_image(source).copy()
    except (UserError, OSError) as error:
        return f'<div class="lost">no picture: {escaped(error)}</div>'
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    data = base64.b64encode(out.getvalue()).decode()
    return f'<img class="pic" alt="{escaped(name)}" src="data:image/jpeg;base64,{data}">'
