# SPDX-License-Identifier: Apache-2.0
"""Memory of a train step as the compiler plans it, against the formula that sizes chunks.

The formula (`Backbone.activation_bytes`, performance document section 1.4) says what a token of a
chunk costs in the backward pass; the plan has a fixed part besides, so slopes are compared: how
much more a chunk of twice the rows needs, per token.
"""

from __future__ import annotations

from benchmarks.abstract import train_step
from benchmarks.beds import Bed
from benchmarks.common import How, Result, Row

ROW_TOKENS = 512


def measure(how: How) -> Result:
    """A row for each policy of rematerialisation."""
    bed = Bed("tiny" if how.quick else "scaled")
    rows = []
    slopes = {}
    for remat in how.pick(("none", "dots", "full"), ("full",)):
        plans = {n: planned(bed, remat, n) for n in (2, 4)}
        slopes[remat] = slope = (plans[4] - plans[2]) / (2 * ROW_TOKENS)
        formula = bed_activation_bytes(bed, remat)
        rows.append(
            Row(
                f"bytes a token, remat {remat}", slope / 1e3, "kB", "the package's formula",
                formula / 1e3, slope / formula, None,
                shapes={"plans_bytes": plans, "row_tokens": ROW_TOKENS, "model": bed.size},
            )
        )  # fmt: skip
    if "none" in slopes:
        ratio = slopes["full"] / slopes["none"]
        what = "bytes a token, everything recomputed"
        rows.append(
            Row(
                what, slopes["full"] / 1e3, "kB", "nothing recomputed", slopes["none"] / 1e3,
                ratio, 0.5, at_most=True,
            )
        )  # fmt: skip
    return Result(rows)


def planned(bed: Bed, remat: str, rows: int, tokens: int = ROW_TOKENS) -> int:
    """Temporary bytes of a LoRA GradCache step with chunks of so many rows of texts."""
    from vlm2vec_jax.packing import RowShape

    row = RowShape(tokens, 0, 16)
    return train_step(bed, pairs=16, rows=rows, row=row, remat=remat).temporary_bytes


def bed_activation_bytes(bed: Bed, remat: str) -> float:
    """What the package expects a token to cost."""
    from vlm2vec_jax.models.phi3v.backbone import activation_bytes

    return activation_bytes(bed.config, remat, remat, 4)[0]
