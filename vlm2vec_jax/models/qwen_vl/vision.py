# SPDX-License-Identifier: Apache-2.0
"""The family's vision tower over packed patches of any grids: no image is padded to a square.

The patches of all images of a row lie end to end, told apart by segments. Every unit says which
place of which grid it is (`processor.py`), from which rotary angles, learned positions and segments
follow, so that a row may hold any mixture of images. Axis legend: see the package.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from vlm2vec_jax.models.qwen_vl.config import ImageConfig, QwenVLConfig, VisionConfig
from vlm2vec_jax.models.qwen_vl.geometry import pixel_table
from vlm2vec_jax.models.shared.decoder_config import stack_values
from vlm2vec_jax.nn.attention import Visibility, attend, attend_near
from vlm2vec_jax.nn.compute import Compute, layer_at, scan_layers
from vlm2vec_jax.nn.linear import Linear
from vlm2vec_jax.nn.norm import LayerNorm, RMSNorm
from vlm2vec_jax.nn.rope import inverse_frequencies, rotate
from vlm2vec_jax.parallel.mesh import ROWS
from vlm2vec_jax.parallel.sharding import constrain, gathered

_EPS = 1e-6
_THETA = 10000.0
_WIDEN = P(None, "fsdp", "tensor")
_NARROW = P(None, "tensor", "fsdp")
_LAYER = r"vision/layers_\d+"

SHARDING: list[tuple[str, P]] = [
    (_LAYER + r"/(attn/qkv|mlp/(fc1|gate|up))/kernel", _WIDEN),
    (_LAYER + r"/(attn/out|mlp/(fc2|down))/kernel", _NARROW),
    (_LAYER + r"/(attn/(qkv|out)|mlp/(fc1|fc2|gate|up|down))/bias", P()),
    (_LAYER + r"/norm[12]/(scale|bias)", P()),
    (r"vision/patch/(kernel|bias)", P()),
    (r"vision/positions", P()),
    (r"vision/merger/fc1/kernel", P("fsdp", "tensor")),
    (r"vision/merger/fc2/kernel", P("tensor", "fsdp")),
    (r"vision/deepstack/fc1/kernel", _WIDEN),
    (r"vision/deepstack/fc2/kernel", _NARROW),
    (r"vision/(merger|deepstack)/(fc[12]/bias|norm/(scale|bias))", P()),
]
"""Rules for `vision`."""


@dataclasses.dataclass(frozen=True)
class PatchPlaces:
    """Where the patches of packed rows stand.

    Attributes:
      cos, sin: f32 [R, P, H], by row and column.
      image: i32 [R, P], equal for the patches of one image.
      window: i32 [R, P], equal for the patches of one window; None where there are none.
    """

    cos: jax.Array
    sin: jax.Array
    image: jax.Array
    window: jax.Array | None


class PatchEmbedding(nnx.Module):
    """Convolution whose stride is its size: a product per patch. Kernel [t, p, p, 3, W].

    A still image is the same frame t times, so the kernel is summed over time.
    """

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        size, times = config.patch_size, config.temporal_patch_size
        shape = (times, size, size, 3, config.width)
        scale = (times * size * size * 3) ** -0.5
        self.kernel = nnx.Param(scale * jax.random.normal(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros((config.width,))) if config.patch_bias else None

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """[..., W] of normalised pixels [..., p * p * 3]."""
        kernel = self.kernel[...].astype(jnp.float32).sum(axis=0)
        y = pixels @ kernel.reshape(-1, kernel.shape[-1]).astype(pixels.dtype)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


def _norm(config: VisionConfig) -> LayerNorm | RMSNorm:
    kind = LayerNorm if config.norm == "layer" else RMSNorm
    return kind(config.width, eps=_EPS)


class VisionAttention(nnx.Module):
    """Attention within images or windows, with biases (HF: VisionAttention)."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.qkv = Linear(config.width, 3 * config.width, bias=True, rngs=rngs)
        self.out = Linear(config.width, config.width, bias=True, rngs=rngs)

    def __call__(self, x, places: PatchPlaces, full, compute: Compute, key) -> jax.Array:
        """Attend; x [R, P, W]; `full` bool [], not by windows (if there are any)."""
        qkv_key, out_key = (None, None) if key is None else jax.random.split(key)
        qkv = self.qkv(x, qkv_key).reshape(*x.shape[:2], 3, self.config.heads, -1)
        q, k, v = (qkv[:, :, n] for n in range(3))
        q, k = rotate(q, places.cos, places.sin), rotate(k, places.cos, places.sin)

        def whole(q, k, v):
            seen = Visibility(places.image, places.image)
            return attend(q, k, v, seen, implementation=compute.attention)

        window = places.window
        if window is None:
            y = whole(q, k, v)
        else:
            reach = (self.config.window_units * self.config.merge) ** 2 - 1

            def near(q, k, v):
                return attend_near(q, k, v, window, reach, implementation=compute.attention)

            y = jax.lax.cond(full, whole, near, q, k, v)
        return self.out(y.reshape(x.shape), out_key)


class VisionMlp(nnx.Module):
    """fc2(act(fc1(x))), or with biases down(silu(gate(x)) * up(x))."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        self.kind = config.mlp
        width, inner = config.width, config.mlp_size
        if config.mlp == "swiglu":
            self.gate = Linear(width, inner, bias=True, rngs=rngs)
            self.up = Linear(width, inner, bias=True, rngs=rngs)
            self.down = Linear(inner, width, bias=True, rngs=rngs)
        else:
            self.fc1 = Linear(width, inner, bias=True, rngs=rngs)
            self.fc2 = Linear(inner, width, bias=True, rngs=rngs)

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Apply to x [..., W]."""
        first, second, third = (None,) * 3 if key is None else jax.random.split(key, 3)
        if self.kind == "swiglu":
            return self.down(jax.nn.silu(self.gate(x, first)) * self.up(x, third), second)
        hidden = self.fc1(x, first)
        if self.kind == "quick_gelu":
            return self.fc2(hidden * jax.nn.sigmoid(1.702 * hidden), second)
        return self.fc2(jax.nn.gelu(hidden, approximate=True), second)


class VisionBlock(nnx.Module):
    """One pre-norm layer."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        self.norm1, self.norm2 = _norm(config), _norm(config)
        self.attn = VisionAttention(config, rngs=rngs)
        self.mlp = VisionMlp(config, rngs=rngs)

    def __call__(self, x, places: PatchPlaces, full, compute: Compute, key=None) -> jax.Array:
        """Run on x [R, P, W]."""
        attn_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        x = x + self.attn(self.norm1(x), places, full, compute, attn_key)
        return x + self.mlp(self.norm2(x), mlp_key)


class Merger(nnx.Module):
    """A unit's patches to one feature: norm, Linear, exact GELU, Linear (HF: PatchMerger)."""

    def __init__(self, config: VisionConfig, *, after: bool, rngs: nnx.Rngs):
        """Set up; `after` normalises the joined patches instead of each."""
        joined = config.width * config.patches_per_unit
        self.joined, self.after = joined, after
        self.norm = LayerNorm(joined, eps=_EPS) if after else _norm(config)
        self.fc1 = Linear(joined, joined, bias=True, rngs=rngs)
        self.fc2 = Linear(joined, config.out_size, bias=True, rngs=rngs)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """[R, C, D] of patches [R, P, W]."""
        first, second = (None, None) if key is None else jax.random.split(key)
        if self.after:
            x = self.norm(x.reshape(x.shape[0], -1, self.joined))
        else:
            x = self.norm(x).reshape(x.shape[0], -1, self.joined)
        return self.fc2(jax.nn.gelu(self.fc1(x, first), approximate=False), second)


class Vision(nnx.Module):
    """Patches, layers and mergers, by what the configuration says.

    Layers are stacked in `layers_0`, `layers_1`, ..., cut behind each layer whose output the
    deepstack takes.
    """

    def __init__(self, config: QwenVLConfig, *, rngs: nnx.Rngs):
        vision = config.vision
        self.config, self.images = vision, config.images
        self.patch = PatchEmbedding(vision, rngs=rngs)
        if vision.position_side:
            shape = (vision.position_side**2, vision.width)
            self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))
        for n, (start, end) in enumerate(spans(vision)):
            setattr(self, f"layers_{n}", _stack(vision, end - start, rngs))
        self.merger = Merger(vision, after=False, rngs=rngs)
        if vision.deepstack:
            keys = jax.random.split(rngs.params(), len(vision.deepstack))
            self.deepstack = jax.vmap(
                lambda key: Merger(vision, after=True, rngs=nnx.Rngs(params=key))
            )(keys)

    def __call__(
        self, visual: dict[str, jax.Array], compute: Compute, key: jax.Array | None = None
    ) -> tuple[jax.Array, list[jax.Array]]:
        """Features of every unit.

        Args:
          visual: `patches` u8 [R, C, m^2, p * p * 3], `grid` i32 [R, C, 5] (place in the image,
            row, column, rows, columns; zeros in padding) and, with windows, `window` i32 [R, C].
          compute: how to compute.
          key: dropout key of adapters, or None.

        Returns:
          [R, C, D], and the same of each deepstack layer.
        """
        config = self.config
        parts = spans(config)
        keys = [None] * 3 if key is None else list(jax.random.split(key, 3))
        stack_keys = (
            [None] * len(parts) if keys[0] is None else jax.random.split(keys[0], len(parts))
        )
        places = self.places(visual)
        x = self.embed(visual, compute)
        deep = []
        for n, (_, end) in enumerate(parts):
            x = self._run(n, x, places, compute, stack_keys[n])
            if end - 1 in config.deepstack:
                deep.append(self._deep(len(deep), x, keys[1]))
        merger = gathered(self.merger, "vision/merger", SHARDING)
        return constrain(merger(x, keys[2]), ROWS), deep

    def _run(self, n: int, x, places: PatchPlaces, compute: Compute, key) -> jax.Array:
        """One stack of layers."""
        start, end = spans(self.config)[n]
        full = jnp.asarray([k in self.config.full_layers for k in range(start, end)])

        def body(x, layer, layer_key):
            layer, full = layer
            layer = gathered(layer, f"vision/layers_{n}", SHARDING, stacked=True)
            return constrain(layer(constrain(x, ROWS), places, full, compute, layer_key), ROWS)

        return scan_layers(
            body, x, (getattr(self, f"layers_{n}"), full), compute=compute.vision, key=key
        )

    def _deep(self, index: int, x: jax.Array, key: jax.Array | None) -> jax.Array:
        merger = gathered(
            layer_at(self.deepstack, index), "vision/deepstack", SHARDING, stacked=True
        )
        return constrain(merger(x, None if key is None else jax.random.fold_in(key, index)), ROWS)

    def embed(self, visual: dict[str, jax.Array], compute: Compute) -> jax.Array:
        """Patches [R, P, W], with learned positions where there are any."""
        pixels = normalise(visual["patches"], self.images).astype(compute.dtype)
        x = self.patch(pixels)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        if self.config.position_side:
            x = x + self._learned(visual["grid"]).astype(x.dtype)
        return constrain(x, ROWS)

    def _learned(self, grid: jax.Array) -> jax.Array:
        """Learned positions resampled to each image's grid, f32 [R, P, W].

        Bilinear with the corners aligned (torch: linspace(0, side - 1, size) along each axis).
        """
        side, merge = self.config.position_side, self.config.merge
        row, column = patch_rows_columns(grid, merge)
        table = self.positions[...].astype(jnp.float32)
        taps = []
        for index, size in ((row, grid[..., 3]), (column, grid[..., 4])):
            last = jnp.repeat(jnp.maximum(size * merge - 1, 1), merge * merge, axis=1)
            source = index.astype(jnp.float32) * (side - 1) / last.astype(jnp.float32)
            low = jnp.floor(source)
            share = source - low
            low = low.astype(jnp.int32)
            taps.append(((low, 1 - share), (jnp.minimum(low + 1, side - 1), share)))
        return sum(
            (table[i * side + j] * (a * b)[..., None] for i, a in taps[0] for j, b in taps[1]),
            start=jnp.zeros((), jnp.float32),
        )

    def places(self, visual: dict[str, jax.Array]) -> PatchPlaces:
        """Angles and segments of the patches of packed rows."""
        config, grid = self.config, visual["grid"]
        size = config.width // config.heads
        half = size // 2
        frequencies = inverse_frequencies(half, _THETA, (1.0,) * (half // 2))
        row, column = patch_rows_columns(grid, config.merge)
        angles = [p.astype(jnp.float32)[..., None] * frequencies for p in (row, column)]
        angles = jnp.concatenate([*angles, *angles], axis=-1)
        # A unit's own place less its place in the image is the image's first unit.
        place = jnp.arange(grid.shape[1])
        image = self._per_patch(place - grid[..., 0])
        window = None
        if config.window_units:
            window = self._per_patch(place - visual["window"])
        return PatchPlaces(jnp.cos(angles), jnp.sin(angles), image, window)

    def _per_patch(self, x: jax.Array) -> jax.Array:
        return jnp.repeat(x, self.config.patches_per_unit, axis=1)

    def hidden_states(self, visual: dict[str, jax.Array], compute: Compute) -> list[jax.Array]:
        """[R, P, W] after every layer: for tests."""
        x, places, states = self.embed(visual, compute), self.places(visual), []
        for n, (start, end) in enumerate(spans(self.config)):
            for index in range(start, end):
                full = jnp.asarray(index in self.config.full_layers)
                layer = layer_at(getattr(self, f"layers_{n}"), index - start)
                x = layer(x, places, full, compute)
                states.append(x)
        return states


def spans(config: VisionConfig) -> list[tuple[int, int]]:
    """First layer and the one behind the last of every stack."""
    ends = sorted({*(d + 1 for d in config.deepstack), config.depth})
    return list(zip([0, *ends[:-1]], ends, strict=True))


def patch_rows_columns(grid: jax.Array, merge: int) -> tuple[jax.Array, jax.Array]:
    """Row and column of every patch in its image, i32 [R, P]; grid i32 [R, C, 5]."""
    inner = jnp.arange(merge)
    rows = grid[..., 1, None, None] * merge + inner[:, None]
    columns = grid[..., 2, None, None] * merge + inner[None, :]
    shape = (*grid.shape[:2], merge, merge)
    flat = (grid.shape[0], -1)
    return (
        jnp.broadcast_to(rows, shape).reshape(flat),
        jnp.broadcast_to(columns, shape).reshape(flat),
    )


def normalise(patches: jax.Array, images: ImageConfig) -> jax.Array:
    """Bytes [..., p * p * 3], channels last, to normalised float32.

    Looked up, bit by bit the host's values: a compiler contracts arithmetic, which is 5e-7 off.
    A TPU gathers single values slowly and computes them instead.
    """

    def look_up(pixels):
        values = jnp.asarray(pixel_table(images.mean, images.std))
        return values[pixels.astype(jnp.int32), jnp.arange(3)]

    def calculate(pixels):
        mean, std = jnp.asarray(images.mean, jnp.float32), jnp.asarray(images.std, jnp.float32)
        return (pixels.astype(jnp.float32) * jnp.float32(1 / 255) - mean) / std

    pixels = patches.reshape(*patches.shape[:-1], -1, 3)
    found = jax.lax.platform_dependent(pixels, tpu=calculate, default=look_up)
    return found.reshape(patches.shape)


def values(config: VisionConfig, remat: str) -> float:
    """Values of a unit that all layers keep, see `shared.decoder_config.stack_values`."""
    w, f = config.width, config.mlp_size
    gates = 2 if config.mlp == "swiglu" else 1
    kept = stack_values(
        config.depth,
        remat,
        width=w,
        attended=w,
        products=5 * w + gates * f,
        # Two norms, the stream between attention and MLP, rotated q and k, what the gate makes.
        elementwise=5 * w + 2 * f,
    )
    return config.patches_per_unit * kept


def flops(config: VisionConfig, units: int) -> float:
    """FLOPs of the tower for the units of one image."""
    if not units:
        return 0.0
    w, f, out = config.width, config.mlp_size, config.out_size
    patches = units * config.patches_per_unit
    mlp = (3 if config.mlp == "swiglu" else 2) * 2 * w * f
    seen = min((config.window_units * config.merge) ** 2 or patches, patches)
    full = len(config.full_layers) if config.window_units else config.depth
    attention = 4 * w * patches * (full * patches + (config.depth - full) * seen)
    joined = w * config.patches_per_unit
    mergers = (1 + len(config.deepstack)) * units * 2 * (joined * joined + joined * out)
    embed = patches * 2 * config.patch_size**2 * 3 * w
    return embed + config.depth * patches * (2 * 4 * w * w + mlp) + attention + mergers


def _stack(config: VisionConfig, depth: int, rngs: nnx.Rngs) -> Any:
    keys = jax.random.split(rngs.params(), depth)
    return jax.vmap(lambda key: VisionBlock(config, rngs=nnx.Rngs(params=key)))(keys)
