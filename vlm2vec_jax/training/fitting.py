# SPDX-License-Identifier: Apache-2.0
"""What a train step keeps for its backward pass, and its chunks, chosen for the memory there is.

The fastest way that fits is taken: a batch in one piece costs fewer passes than GradCache, and
keeping activations fewer than computing them again; with GradCache the second pass over a chunk
is a recomputation already. Which way could fit is estimated; where the step can be compiled for
devices that say how much memory they have, its memory analysis decides (`settling` for a run,
`plan` for the report).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from vlm2vec_jax.config import Config
from vlm2vec_jax.models.loading import Model, flatten
from vlm2vec_jax.parallel import chips
from vlm2vec_jax.parallel.mesh import row_shards
from vlm2vec_jax.parallel.sharding import bytes_per_chip
from vlm2vec_jax.training.batching import RowSizes
from vlm2vec_jax.training.state import Trainer

USABLE = 0.95
"""Share of a chip's memory that a program may plan with; the rest is the runtime's."""
LEAST_CHUNK = 2048
"""Tokens of a device below which a chunk hardly keeps a chip busy."""
MOST_CHUNK = 16384
"""Tokens of a device beyond which a chunk is hardly faster, if at all."""
PER_CHUNK = 100
"""What a chunk costs besides its tokens, in tokens: reading the weights once (8.3 GB at 2.8 TB/s in
a v5p take 3 ms, in which it computes 95 tokens at half its peak)."""
GATHERING = 1000
"""What gathering the weights for a chunk costs under fsdp, in tokens, on a chip that is not known;
see `gathering`."""
OVER = {"none": 1.4, "dots": 1.5, "full": 1.0, "offload": 1.0}
"""What a compiled LoRA step has as temporaries over the values that are counted, by the decoder's
remat: inputs that adapters dropped, masks, float32 copies for norms (tests/goldens/tpu_programs:
none 1.35 to 1.4, dots 1.5, full 0.9)."""
DORA = 1.3
"""What DoRA's elementwise product at every adapted layer adds to that where its input is kept
(Qwen2-VL-7B and LLaVA-NeXT-7B: 1.75 and 1.85 in place of 1.4)."""
MOST_TRIALS = 4
"""Steps that may be compiled for a choice; each costs what the run's own does."""


class Way(NamedTuple):
    """A way to make the step.

    Attributes:
      cached: GradCache.
      remat: of the decoder, see `nn.compute.Compute`.
      remat_vision: of the vision tower.
    """

    cached: bool
    remat: str
    remat_vision: str


class Fit(NamedTuple):
    """What was chosen.

    Attributes:
      config: with `grad_cache`, `remat`, `remat_vision` and `packing.chunk_tokens` settled.
      words: what and why, one line for the start-up page; empty if there was nothing to choose.
    """

    config: Config
    words: str

    @property
    def chosen(self) -> dict[str, Any]:
        """What was settled, JSON-able, for a checkpoint; see `taken_up`."""
        config = self.config
        return {name: getattr(config, name) for name in Way._fields if name != "cached"} | {
            "grad_cache": config.grad_cache,
            "chunk_tokens": config.packing.chunk_tokens,
        }


def ways(config: Config) -> list[Way]:
    """What the configuration leaves open, fastest first."""
    # The tower's layers again cost a twelfth of a LoRA step's products (counted in the program for
    # v6e-16), elementwise work again none of them.
    kept = [
        *(("none", "none"), ("dots", "dots"), ("none", "full"), ("dots", "full")),
        ("full", "full"),
    ]
    if config.remat != "auto":
        kept = [(config.remat, config.remat)]
    if config.remat_vision != "same":
        kept = list(dict.fromkeys((remat, config.remat_vision) for remat, _ in kept))
    cached = {"auto": (False, True), "on": (True,), "off": (False,)}[config.grad_cache]
    return [Way(how, *pair) for how in cached for pair in kept]


def held(trainer: Trainer) -> dict[str, int]:
    """Bytes of a device that do not depend on the batch."""

    def size(tree) -> int:
        leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "sharding")]
        return sum(bytes_per_chip(leaf, leaf.sharding) for leaf in leaves)

    params = size(trainer.state.params)
    return {
        "weights": params + size(trainer.frozen),
        "optimizer": size(trainer.state.opt),
        "gradients": params,
    }


def activations(
    config: Config, model: Model, way: Way, rows: RowSizes, tokens: float, *, tower: bool = True
) -> float:
    """Estimated bytes that the backward pass of so many tokens of a device keeps.

    Without `tower` nothing in the vision tower is trained: no gradient goes there, and it keeps
    nothing for one.
    """
    itemsize = np.dtype(config.model.dtype).itemsize
    per_token, per_unit = model.backbone.activation_bytes(
        model.config, way.remat, way.remat_vision, itemsize
    )
    over = OVER[way.remat]
    if config.adapter.type == "dora" and way.remat in ("none", "dots"):
        over *= DORA
    return over * tokens * (per_token + tower * rows.units / rows.visual * per_unit)


def fit(
    config: Config,
    model: Model,
    trainer: Trainer,
    rows: RowSizes,
    *,
    memory: int,
    chip: str = "",
    compiled: Callable[[Config], int] | None = None,
) -> Fit:
    """Settle what the configuration leaves open.

    Args:
      config: checked.
      model: loaded or abstract.
      trainer: its state may be shapes.
      rows: of the run's batches.
      memory: bytes of a device.
      chip: jax's name for its kind, see `gathering`.
      compiled: (settled configuration) -> bytes that its compiled step needs of a device, called
        at most `MOST_TRIALS` times; None to go by the estimate alone.
    """
    found = ways(config)
    given = config.packing.chunk_tokens
    # Tokens of a device, were the batch in one piece.
    inputs = (2 + config.loss.negatives) * config.batch_size
    whole = int(inputs * rows.mean_tokens / 0.9 / row_shards(trainer.mesh))
    if given and whole > given:
        found = [way for way in found if way.cached or config.grad_cache == "off"]
    if len(found) == 1 and (given or not found[0].cached):
        return Fit(_settled(config, found[0], given), "")
    tower = any(path.startswith("vision/") for path in flatten(trainer.state.params))
    if not tower:  # ways that differ there only are the same
        kinds: dict[tuple[bool, str], Way] = {}
        for way in found:
            kinds.setdefault((way.cached, way.remat), way)
        found = list(kinds.values())
    row = max(rows.text, rows.visual)
    least = max(min(LEAST_CHUNK, whole), row)
    gathers = gathering(config, model, trainer, rows, chip)
    most = max(largest_chunk(whole, PER_CHUNK + gathers) // row * row, row)
    # With smaller chunks gathering costs more than to recompute everything in the largest.
    enough = max(3 * gathers / (1 + 3 * gathers / most), least)
    limit, fixed = int(USABLE * memory), sum(held(trainer).values())
    tried: list[str] = []
    # What a compiled step kept over its estimate: the next one is taken to be no better.
    factor = 1.0
    for way in found:
        slope = activations(config, model, way, rows, 1.0, tower=tower)
        fewest = least if way is found[-1] else enough
        while True:
            room = int(max(limit - fixed, 0) / max(factor * slope, 1e-9))
            tokens = given if way.cached else whole
            if way.cached and not given:
                tokens = min(room // row * row, most)
            if tokens > room or tokens < (fewest if way.cached and not given else 0):
                break  # by what is known so far: the next way
            fitted = _settled(config, way, tokens)
            if compiled is None or len(tried) == MOST_TRIALS:
                return Fit(fitted, _told(way, tokens, memory, tried))
            peak = compiled(fitted)
            tried.append(f"{_words(way, tokens)}: {peak / 1e9:.1f} GB")
            if peak <= limit:
                return Fit(fitted, _told(way, tokens, memory, tried))
            factor = (peak - fixed) / max(slope * tokens, 1e-9)
    # The most frugal way; the run will say what is missing.
    tokens = given or least
    told = f"{_told(found[-1], tokens, memory, tried)}; nothing seems to fit, this needs least"
    return Fit(_settled(config, found[-1], tokens), told)


def largest_chunk(whole: int, per_chunk: float = PER_CHUNK) -> int:
    """Tokens of a chunk beyond which a step of so many tokens would be slower.

    Each chunk costs `per_chunk` tokens, and on average half of the last one is empty: t / 2 +
    whole / t x `per_chunk` tokens are lost with chunks of t, least at the square root of 2 x whole
    x that.
    """
    best = math.isqrt(int(2 * per_chunk * whole))
    return min(max(best, LEAST_CHUNK), MOST_CHUNK, whole)


def gathering(config: Config, model: Model, trainer: Trainer, rows: RowSizes, chip: str) -> float:
    """Tokens that a device computes at half its peak while fsdp gathers all layers once; else 0.

    Every pass over a chunk, forward or backward, gathers them once. They are taken to be waited
    for: how much of it hides behind computing, only a run could tell. `chip` is jax's name for the
    devices' kind; `GATHERING` where nothing is known of it.
    """
    others = trainer.mesh.shape["fsdp"] - 1
    if not others:
        return 0.0
    peak, link = chips.peak_flops(chip), chips.link_bytes(chip)
    if peak is None or link is None:
        return GATHERING
    received = 0
    for path, leaf in {**flatten(trainer.frozen), **flatten(trainer.state.params)}.items():
        # The table is gathered outside of the chunk loops, the head never.
        if path == "embed/table" or model.backbone.is_unused(path):
            continue
        if "fsdp" in jax.tree.leaves(tuple(leaf.sharding.spec)):
            received += others * math.prod(leaf.sharding.shard_shape(leaf.shape))
    seconds = received * np.dtype(config.model.dtype).itemsize / link
    flops = model.backbone.flops(model.config, rows.visual, rows.units) / rows.visual
    return seconds * peak / 2 / (flops / trainer.mesh.shape["tensor"])


def taken_up(config: Config, chosen: dict[str, Any]) -> Fit | None:
    """What an earlier part of the run chose, so that going on adds up exactly as it would have.

    Args:
      config: checked.
      chosen: of `Fit.chosen`.

    Returns:
      None if the configuration asks for something else now.
    """
    tokens = chosen["chunk_tokens"]
    way = Way(chosen["grad_cache"] == "on", chosen["remat"], chosen["remat_vision"])
    if way not in ways(config) or config.packing.chunk_tokens not in (0, tokens):
        return None
    return Fit(_settled(config, way, tokens), f"{_words(way, tokens)}, as before")


def _settled(config: Config, way: Way, tokens: int) -> Config:
    packing = config.packing
    if way.cached:
        packing = dataclasses.replace(packing, chunk_tokens=tokens)
    return dataclasses.replace(
        config,
        grad_cache="on" if way.cached else "off",
        remat=way.remat,
        remat_vision=way.remat_vision,
        packing=packing,
    )


def _words(way: Way, tokens: int) -> str:
    how = f"GradCache, chunks of {tokens:,} tokens a device" if way.cached else "the plain step"
    vision = "" if way.remat_vision == way.remat else f" (vision {way.remat_vision})"
    return f"{how}, remat {way.remat}{vision}"


def _told(way: Way, tokens: int, memory: int, tried: list[str]) -> str:
    how = f"compiled {'; '.join(tried)}" if tried else "by estimate"
    return f"{_words(way, tokens)}, chosen for {memory / 1e9:.1f} GB a device ({how})"
