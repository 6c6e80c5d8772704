# SPDX-License-Identifier: Apache-2.0
"""Between the packed order of embeddings and the loss's: one exchange there, one back.

Packing leaves an embedding on the device that holds its row; the loss wants queries and targets
in order. Either every device gets all of them (one gather), or each gets its own share of the
order: then blocks travel once around all devices, each takes out what is its own, and no device
ever holds more than two shares (`losses.tiled`'s ring works on these).

Slots: 0..B-1 are queries, B + j is column j of the loss; -1 is an empty place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from vlm2vec_jax.losses.tiled import row_devices
from vlm2vec_jax.parallel.mesh import ROWS
from vlm2vec_jax.parallel.sharding import constrain

_PACKED = P(None, ROWS)


class Sides(NamedTuple):
    """What the loss takes, or its gradient.

    Attributes:
      queries: f32 [B, D].
      columns: f32 [M, D].
    """

    queries: jax.Array
    columns: jax.Array


def collect(
    slots: Sequence[jax.Array], embedded: Sequence[jax.Array], pairs: int, columns: int, ring: bool
) -> Sides:
    """Put embeddings [K, R, S, D] of slots [K, R, S] in order.

    Args:
      slots: i32, per group.
      embedded: f32, per group, spread by rows.
      pairs: B.
      columns: M.
      ring: leave each device its own share; False gives all of it to every device.
    """
    if ring and row_devices() > 1:
        return _ring_collect(list(slots), list(embedded), pairs, columns)
    whole = in_slots(slots, embedded, pairs + columns)
    return Sides(whole[:pairs], whole[pairs:])


def deliver(sides: Sides, slots: Sequence[jax.Array], ring: bool) -> list[jax.Array]:
    """The rows of a gradient for slots [K, R, S]: f32 [K, R, S, D] per group, zero if empty."""
    if ring and row_devices() > 1:
        return _ring_deliver(sides, list(slots))
    whole = constrain(jnp.concatenate(sides))

    def own(slot: jax.Array) -> jax.Array:
        found = jnp.where((slot >= 0)[..., None], whole[jnp.maximum(slot, 0)], 0.0)
        return constrain(found, None, ROWS)

    return [own(slot) for slot in slots]


def in_slots(slots: Sequence[jax.Array], embedded: Sequence[jax.Array], count: int) -> jax.Array:
    """Put embeddings [..., S, D] of slots [..., S] in order: f32 [count, D], whole everywhere."""
    out = jnp.zeros((count, embedded[0].shape[-1]), jnp.float32)
    for slot, values in zip(slots, embedded, strict=True):
        # One gather of the embeddings, nothing else of the batch leaves its chip.
        values = constrain(values.reshape(-1, values.shape[-1]))
        # Out of range is dropped; -1 would be the last.
        index = jnp.where(slot < 0, count, slot).reshape(-1)
        out = out.at[index].set(values, mode="drop")
    return constrain(out)


def _ring_collect(slots, embedded, pairs: int, columns: int) -> Sides:
    devices = row_devices()

    def run(slots, embedded):
        me = jax.lax.axis_index(ROWS)
        width = embedded[0].shape[-1]
        mine = Sides(*(jnp.zeros((n // devices, width), jnp.float32) for n in (pairs, columns)))

        def step(state, _):
            mine, (slots, embedded) = state
            for slot, values in zip(slots, embedded, strict=True):
                slot, values = slot.reshape(-1), values.reshape(-1, width)
                queries = _place(slot, 0, mine.queries, me)
                targets = _place(slot, pairs, mine.columns, me)
                mine = Sides(
                    mine.queries.at[queries].set(values, mode="drop"),
                    mine.columns.at[targets].set(values, mode="drop"),
                )
            return (mine, _pass_on((slots, embedded))), None

        return jax.lax.scan(step, (mine, (slots, embedded)), None, devices)[0][0]

    spread = [_PACKED] * len(slots)
    return jax.shard_map(run, in_specs=(spread, spread), out_specs=P(ROWS), check_vma=False)(
        slots, embedded
    )


def _ring_deliver(sides: Sides, slots) -> list[jax.Array]:
    devices = row_devices()
    pairs = sides.queries.shape[0]

    def run(sides: Sides, slots):
        width = sides.queries.shape[-1]
        found = [jnp.zeros((*slot.shape, width), jnp.float32) for slot in slots]

        def step(state, _):
            found, sides, owner = state
            out = []
            for slot, have in zip(slots, found, strict=True):
                for first, part in ((0, sides.queries), (pairs, sides.columns)):
                    place = _place(slot, first, part, owner)
                    here = place < part.shape[0]
                    taken = part[jnp.minimum(place, part.shape[0] - 1)]
                    have = jnp.where(here[..., None], taken, have)
                out.append(have)
            return (out, *_pass_on((sides, owner))), None

        start = (found, sides, jax.lax.axis_index(ROWS))
        return jax.lax.scan(step, start, None, devices)[0][0]

    packed = [_PACKED] * len(slots)
    return jax.shard_map(run, in_specs=(P(ROWS), packed), out_specs=packed, check_vma=False)(
        sides, slots
    )


def _place(slot: jax.Array, first: int, part: jax.Array, owner: jax.Array) -> jax.Array:
    """Where slots stand in `owner`'s share of a side that begins at `first`; its size if not."""
    size = part.shape[0]
    place = slot - first - owner * size
    return jnp.where((slot >= first) & (place >= 0) & (place < size), place, size)


def _pass_on(tree):
    devices = row_devices()
    return jax.lax.ppermute(tree, ROWS, [(j, (j + 1) % devices) for j in range(devices)])
