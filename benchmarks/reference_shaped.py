# SPDX-License-Identifier: Apache-2.0
"""The baseline: our model computed as the reference computes it, each of its habits one switch.

Every form gives the embeddings, the loss and the gradients of the plain model
(`tests/test_benchmarks.py`). What the reference computes and throws away (the language model's
head, CLIP's last layer) is handed back beside the result, so that the compiler cannot drop it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vlm2vec_jax.inputs import EncodedInput, VisualLayout
from vlm2vec_jax.models.phi3v.global_view import with_global_views
from vlm2vec_jax.models.phi3v.vision import merge_patches, normalised
from vlm2vec_jax.models.shared.parts import put_features
from vlm2vec_jax.nn.compute import Compute, scan_layers
from vlm2vec_jax.nn.dropout import keep_mask
from vlm2vec_jax.nn.linear import Linear, linears
from vlm2vec_jax.nn.norm import l2_normalize
from vlm2vec_jax.packing import PackedBatch, RowShape, fill


@dataclasses.dataclass(frozen=True)
class Form:
    """Which of the reference's habits are kept; all of them by default.

    Attributes:
      right_padding: every input a row, in the order given, as long as the batch's longest;
        otherwise packed rows.
      padded_crops: every image has the most crops and all go through the vision tower.
      host_pixels: crops come as normalised float32 with global views that the host has made
        (`with_pixels`); otherwise as 8-bit crops of which the device makes them.
      dense_attention: all logits of a row at once, in float32; otherwise `Compute.attention`.
      lm_head: logits of the vocabulary at every token, in float32.
      full_layers: the last decoder layer at every token, and the last layer of CLIP.
      peft_dora: DoRA as PEFT 0.11 writes it (`PeftLinear`).
      inner_remat: each layer's activations are recomputed in the backward pass.
    """

    right_padding: bool = True
    padded_crops: bool = True
    host_pixels: bool = True
    dense_attention: bool = True
    lm_head: bool = True
    full_layers: bool = True
    peft_dora: bool = True
    inner_remat: bool = True

    def __post_init__(self):
        if self.lm_head and not self.full_layers:
            raise ValueError("the head reads the last layer at every token: full_layers is needed")

    def compute(self, plain: Compute) -> Compute:
        """`plain` with the habits that are a matter of how the layers are computed."""
        return dataclasses.replace(
            plain,
            attention="dense" if self.dense_attention else plain.attention,
            remat="full" if self.inner_remat else plain.remat,
        )


REFERENCE = Form()
PLAIN = Form(False, False, False, False, False, False, False, False)
REMEDIES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("peft_dora",), "DoRA's norm once per step, one product with W"),
    (("lm_head", "full_layers"), "no head, last layer for pooled tokens, no last layer of CLIP"),
    (("padded_crops",), "real crops only"),
    (("host_pixels",), "8-bit crops, normalised on the device"),
    (("dense_attention",), "attention of the platform"),
    (("inner_remat",), "no inner rematerialisation"),
    (("right_padding",), "packed rows"),
)
"""Switches in the order in which they are turned off, and what takes their place."""


class PeftLinear(Linear):
    """DoRA as PEFT 0.11.1 computes it (`DoraLinearLayer.forward`).

    A B is written out, the norm of W + s A B is taken anew in every forward pass, and the input
    goes through W twice. The second product names another precision, of which float32 on a CPU
    and bfloat16 anywhere know nothing: else the compiler would see that both are one.
    """

    def _adapt(self, x, y, kernel, key):
        if self.magnitude is None:
            return super()._adapt(x, y, kernel, key)
        dropped = x
        if key is not None and self.lora_dropout > 0:
            keep = keep_mask(key, self.lora_dropout, x.shape)
            dropped = jnp.where(keep, x / (1 - self.lora_dropout), 0).astype(x.dtype)
        scale = self._scale() if self.adapter_scale is not None else self.lora_scale
        a, b = self.lora_a[...], self.lora_b[...]
        low = (dropped @ a.astype(x.dtype)) @ b.astype(x.dtype)
        whole = kernel.astype(jnp.float32) + scale * (a @ b)
        norm = jax.lax.stop_gradient(jnp.linalg.norm(whole, axis=-2))
        gain = (self.magnitude[...] / norm).astype(y.dtype)
        again = jnp.matmul(dropped, kernel, precision=jax.lax.Precision.HIGHEST)
        return y + (gain - 1) * again + gain * jnp.asarray(scale, y.dtype) * low


def use_peft_form(module: nnx.Module) -> None:
    """Let every DoRA of a model compute as PEFT does, in place."""
    for linear in linears(module).values():
        if linear.magnitude is not None:
            linear.__class__ = PeftLinear


def with_most_crops(item: EncodedInput, most: int) -> EncodedInput:
    """The input with black crops behind its own, up to `most`; nothing for a text."""
    missing = most - item.units
    if not item.units or missing <= 0:
        return item
    visual = {
        name: np.concatenate([leaf, np.zeros((missing, *leaf.shape[1:]), leaf.dtype)])
        for name, leaf in item.visual.items()
    }
    return dataclasses.replace(item, visual=visual, units=most)


def with_pixels(item: EncodedInput) -> EncodedInput:
    """The input with its crops as the reference's processor hands them over; a text as it is."""
    if not item.units or "pixels" in item.visual:
        return item
    pixels = np.asarray(_pixels(item.visual["crops"][None], item.visual["crop_info"][None])[0])
    return dataclasses.replace(item, visual={"pixels": pixels})


_pixels = jax.jit(with_global_views)


def layout_of(items: Sequence[EncodedInput], layout: VisualLayout) -> VisualLayout:
    """The layout for inputs of which some may have gone through `with_pixels`."""
    if "pixels" in layout.units or not any("pixels" in item.visual for item in items):
        return layout
    return dataclasses.replace(layout, units={"pixels": (layout.units["crops"][0], "float32")})


def right_padded(
    items: Sequence[EncodedInput],
    layout: VisualLayout,
    multiple: int = 1,
    units: int = 0,
    first: int = 0,
) -> PackedBatch:
    """One input to a row, all rows as long as the longest; inputs with images in front.

    Crops are given for those alone (the reference, too, spares texts its vision tower), so
    `visual` has fewer rows than the rest.

    Args:
      items: the batch.
      layout: of the backbone.
      multiple: the length is rounded up to one, where a program for each would take too long to
        compile.
      units: an image has at least so many crops.
      first: slot of the first input.
    """
    order = sorted(range(len(items)), key=lambda i: items[i].units == 0)
    pictures = sum(item.units > 0 for item in items)
    length = -(-max(map(len, items)) // multiple) * multiple
    most = max(item.units for item in items)
    shape = RowShape(length, max(most, units) if most else 0, 1)
    layout = layout_of(items, layout)
    slots = range(first, first + len(items))
    batch = fill([[i] for i in order], items, shape, layout, slots=slots)
    return batch._replace(visual={name: leaf[:pictures] for name, leaf in batch.visual.items()})


def embed(
    module, batch: PackedBatch, compute: Compute, form: Form, key: jax.Array | None = None
) -> tuple[jax.Array, list[jax.Array]]:
    """Embeddings f32 [R, S, D] of Phi-3.5-Vision, and what was computed for nothing.

    Args:
      module: the model; `use_peft_form` has been called on it if the form says so.
      batch: of any kind; `visual` may have fewer rows than the rest (`right_padded`).
      compute: how to compute what the form leaves open.
      form: the habits.
      key: dropout key of adapters, or None.
    """
    compute = form.compute(compute)
    vision_key, decoder_key = (None, None) if key is None else jax.random.split(key)
    waste: list[jax.Array] = []
    x = module.embed(batch.tokens).astype(compute.dtype)
    if batch.visual:
        table, unused = _visual_table(module.vision, batch.visual, compute, form, vision_key)
        waste += unused
        count = len(table)
        front = put_features(x[:count], table, batch.feature_index[:count])
        x = jnp.concatenate([front, x[count:]])
    places = module.decoder.places(batch)
    if not form.full_layers:
        pooled = module.decoder(x, places, batch.pool_index, compute, decoder_key)
        return l2_normalize(pooled), waste

    def body(x, layer, layer_key):
        return layer(x, places, compute, key=layer_key)

    for n, (name, _) in enumerate(module.decoder.stacks):
        own = None if decoder_key is None else jax.random.fold_in(decoder_key, n)
        x = scan_layers(body, x, getattr(module.decoder, name), compute=compute, key=own)
    states = module.decoder.norm(x)
    if form.lm_head:
        waste.append(module.lm_head(states).astype(jnp.float32))
    pooled = jnp.take_along_axis(states, batch.pool_index[..., None], axis=1)
    return l2_normalize(pooled), waste


def _visual_table(vision, visual, compute: Compute, form: Form, key):
    """`Vision.table`, and the output of CLIP's last layer where the form has it run."""
    if not form.full_layers or not hasattr(vision.clip, "unused_layers"):
        return vision.table(visual, compute, key), []
    clip_key, projector_key = (None, None) if key is None else jax.random.split(key)
    pixels = normalised(visual).astype(compute.dtype)
    rows, count = pixels.shape[:2]
    clip = vision.clip

    def body(x, layer, layer_key):
        return layer(x, compute, layer_key)

    x = clip.embed(pixels.reshape(-1, *pixels.shape[2:]))
    x = scan_layers(body, x, clip.layers, compute=compute, key=clip_key)
    unused = scan_layers(body, x, clip.unused_layers, compute=compute)
    merged = merge_patches(x[:, 1:])
    merged = merged.reshape(rows, count * merged.shape[1], merged.shape[2])
    shared = jnp.stack([vision.newline[...], vision.separator[...]]).astype(merged.dtype)
    shared = jnp.broadcast_to(shared, (rows, *shared.shape))
    table = vision.projector(jnp.concatenate([shared, merged], axis=1), projector_key)
    return table, [jax.lax.stop_gradient(unused)]


class Embedding:
    """Embeds lists of inputs in batches, in a form; the evaluation of the reference."""

    def __init__(self, module, layout: VisualLayout, compute: Compute, form: Form = REFERENCE):
        """Take a model (Phi-3.5-Vision)."""
        graphdef, self._state = nnx.split(module)
        self._layout, self._form = layout, form
        self._run = jax.jit(lambda s, b: embed(nnx.merge(graphdef, s), b, compute, form))

    def __call__(
        self, items: Sequence[EncodedInput], size: int, most_crops: int = 0, multiple: int = 1
    ) -> np.ndarray:
        """Embeddings f32 [N, D] in the order of the items.

        Args:
          items: inputs; those of `with_pixels` spare the device the making of global views.
          size: of a batch, in inputs.
          most_crops: of an image, its global view included, where the form pads crops.
          multiple: lengths of batches are rounded up to one.
        """
        most = most_crops if self._form.padded_crops else 0
        out: list[np.ndarray] = []
        for start in range(0, len(items), size):
            batch = right_padded(items[start : start + size], self._layout, multiple, most)
            found, _ = jax.block_until_ready(self._run(self._state, jax.tree.map(jnp.array, batch)))
            ordered = np.empty(found[:, 0].shape, np.float32)
            ordered[batch.slot[:, 0]] = found[:, 0]
            out.append(ordered)
        return np.concatenate(out)
