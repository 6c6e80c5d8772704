# SPDX-License-Identifier: Apache-2.0
"""FLOPs of a compiled program, counted from its text: every product, as often as its loops run.

XLA's own cost analysis counts the body of a loop once and a Pallas kernel as nothing. Here loops
are multiplied out, a product is counted by its shapes (a TPU writes products of matrices as
convolutions, batches as dilated ones, of which only what meets real elements counts), and a splash
attention kernel by the blocks that it computes. A multiply and an add are two FLOPs; everything
that is not a product of matrices is left out, as in `Backbone.flops`.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import NamedTuple

from vlm2vec_jax.parallel import hlo

_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_KERNEL = re.compile(r"^splash_\w*?(fwd|dkv|dq)")
_PRODUCTS_OF_KERNEL = {"fwd": 2, "dq": 3, "dkv": 4}
"""Products of a block in splash attention's kernels: logits and values; logits again, their
gradient and q's; logits again, their gradient, k's and v's, and q's where one kernel does both."""
_BLOCKS = {"fwd": ("block_q", "block_kv"), "dq": ("block_q_dq", "block_kv_dq")}
_BLOCKS["dkv"] = ("block_q_dkv", "block_kv_dkv")


class Product(NamedTuple):
    """A product of a compiled program.

    Attributes:
      flops: on one chip, each time that it runs.
      loops: trip counts of the loops around it, outermost first; None where nobody knows.
      kind: "dot", "convolution", or the name of an attention kernel.
      source: the jax operation that it came from.
    """

    flops: float
    loops: tuple[int | None, ...]
    kind: str
    source: str

    def total(self) -> float:
        """Over all passes of its loops; a loop whose count nobody knows runs once."""
        return self.flops * math.prod(1 if n is None else n for n in self.loops)


def products(
    text: str, runs: Callable[[str], int | None] = lambda line: None
) -> tuple[Product, ...]:
    """The products of a compiled program.

    Args:
      text: of the program (`aot.with_text`).
      runs: the line of a loop whose count is known at run time only -> how often it runs.

    Raises:
      ValueError: for a kernel that is not known, as it would be left out.
    """
    found: list[Product] = []

    def visit(op: hlo.Operation) -> None:
        kind, flops = op.opcode, 0.0
        if kind == "dot":
            flops = _dot(op)
        elif kind == "convolution":
            flops = _convolution(op)
        elif kind == "custom-call" and 'custom_call_target="tpu_custom_call"' in op.line:
            kind, flops = _kernel(op)
        if flops:
            found.append(Product(flops, op.loops, kind, op.source))

    hlo.walk(text, visit, runs)
    return tuple(found)


def flops(text: str, runs: Callable[[str], int | None] = lambda line: None) -> dict[str, float]:
    """FLOPs of a compiled program on one chip: its products, and its attention kernels.

    See `products`. Attention without a kernel is among the products.
    """
    found = products(text, runs)
    kernels = sum(product.total() for product in found if product.kind.startswith("splash"))
    return {"products": sum(p.total() for p in found) - kernels, "attention": kernels}


def _dot(op: hlo.Operation) -> float:
    """2 x the results x the terms of each."""
    (lhs,), (result,) = op.operands[0], op.result
    contracted = _CONTRACTED.search(op.line)
    dims = [int(d) for d in contracted.group(1).split(",") if d] if contracted else []
    return 2.0 * math.prod(result.shape) * math.prod(lhs.shape[d] for d in dims)


def _convolution(op: hlo.Operation) -> float:
    """2 x batch x features out x features in x the pairs of window and result that are real."""
    ((lhs,), (rhs,)), (result,) = op.operands[:2], op.result
    labels = _LABELS.search(op.line)
    if labels is None:
        raise ValueError(f"a convolution without labels: {op.line}")
    shapes = (lhs.shape, rhs.shape, result.shape)
    of_lhs, of_rhs, of_result = (
        dict(zip(names, shape, strict=True))
        for names, shape in zip(labels.groups(), shapes, strict=True)
    )
    window = _WINDOW.search(op.line)
    said = dict(part.split("=") for part in window.group(1).split()) if window else {}
    count = sum(label.isdigit() for label in of_result)

    def each(name: str, default: str) -> list[str]:
        return said[name].split("x") if name in said else [default] * count

    pairs = 1
    for d, (size, stride, pad, base, dilate) in enumerate(
        zip(
            each("size", "1"), each("stride", "1"), each("pad", "0_0"), each("lhs_dilate", "1"),
            each("rhs_dilate", "1"), strict=True,
        )
    ):  # fmt: skip
        pairs *= _real_pairs(
            of_result[str(d)], int(size), int(stride), int(pad.split("_")[0]), of_lhs[str(d)],
            int(base), int(dilate),
        )  # fmt: skip
    return 2.0 * of_result["b"] * of_result["f"] * of_rhs["i"] * pairs


@functools.lru_cache(maxsize=4096)
def _real_pairs(
    results: int, window: int, stride: int, pad: int, length: int, base: int, dilate: int
) -> int:
    """Pairs of a result and a place of the window that meet an element, not padding or a hole."""
    total, last = 0, (length - 1) * base
    for k in range(window):
        at = k * dilate - pad  # result r meets place r * stride + at
        first = max(0, -(at // stride))
        end = min(results - 1, (last - at) // stride)
        if end < first:
            continue
        step = base // math.gcd(stride, base)
        start = next(
            (r for r in range(first, min(first + step, end + 1)) if (r * stride + at) % base == 0),
            None,
        )
        if start is not None:
            total += (end - start) // step + 1
    return total


def _kernel(op: hlo.Operation) -> tuple[str, float]:
    """Name and FLOPs of a splash attention kernel: the blocks that its mask leaves."""
    named = _KERNEL.match(op.name)
    if named is None:
        raise ValueError(f"{op.name}: a kernel whose FLOPs are not known")
    part = named.group(1)
    takes = [array for (array,) in op.operands]
    # q and k are the first that are not whole numbers; a single row has no axis for rows.
    floats = [array.shape for array in takes if array.dtype[0] not in "su"]
    (*rows, heads, queries, width), (*_, keys, _) = floats[:2]
    said = [re.search(rf'\\"{name}\\": (\d+)', op.line) for name in _BLOCKS[part]]
    if None in said:
        raise ValueError(f"{op.name}: the blocks of the kernel are not told")
    high, wide = (int(found.group(1)) for found in said if found)
    down, across = -(-queries // high), -(-keys // wide)
    blocks = down * across
    # Each token's segment comes in two arrays, of queries and of keys. One more has the places of
    # the queries, the same for all rows: it is there if order decides what is seen.
    ids = [a for a in takes if a.dtype == "s32" and {queries, keys} & set(a.shape)]
    if len(ids) > (2 if "segmented" in op.name else 0):
        blocks = sum(min(-(-(i + 1) * high // wide), across) for i in range(down))
    count = _PRODUCTS_OF_KERNEL[part]
    if part == "dkv" and any(len(array.shape) == len(rows) + 4 for array in op.result):
        count += 1  # it has q's gradient, too, by blocks of keys
    flops = 2.0 * count * blocks * high * wide * width
    return f"splash {part}", math.prod(rows) * heads * flops
