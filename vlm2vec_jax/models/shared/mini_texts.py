# SPDX-License-Identifier: Apache-2.0
"""The texts that a small model's tokenizer learns from. No jax."""

from __future__ import annotations

from pathlib import Path

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.inputs import IMAGE_MARKER


def training_texts(data: str | Path) -> list[str]:
    """Read the texts of every training subset, cut at image markers as processors cut them.

    Raises:
      UserError: if there is no training parquet below the folder.
    """
    import pyarrow.parquet as pq

    root = Path(data)
    root = root / "train" if (root / "train").is_dir() else root
    files = sorted(root.glob("*/*.parquet"))
    if not files:
        raise UserError(f"no <Subset>/<split>-*.parquet below {root}: is this a training folder?")
    texts: list[str] = []
    for file in files:
        names = pq.read_schema(file).names
        columns = [name for name in ("qry", "pos_text") if name in names]
        for column in pq.read_table(file, columns=columns).columns:
            for text in column.to_pylist():
                texts += [piece for piece in IMAGE_MARKER.split(text)[::2] if piece]
    return texts
