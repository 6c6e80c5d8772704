# SPDX-License-Identifier: Apache-2.0
"""The CLIP vision tower, up to the layer whose output is used, and how its weights are spread.

Wherever it is used it stands at `vision/clip` of the model.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from vlm2vec_jax.models.shared.clip_config import ClipConfig
from vlm2vec_jax.nn.attention import attend
from vlm2vec_jax.nn.compute import Compute, layer_at, scan_layers
from vlm2vec_jax.nn.linear import Linear
from vlm2vec_jax.nn.norm import LayerNorm
from vlm2vec_jax.parallel.mesh import ROWS
from vlm2vec_jax.parallel.sharding import constrain, gathered

_LAYERS = r"vision/clip/(layers|unused_layers)"
RULES: list[tuple[str, P]] = [
    # Leading None: the axis of stacked layers.
    (_LAYERS + r"/(attn/[qkv]|mlp/fc1)/kernel", P(None, "fsdp", "tensor")),
    (_LAYERS + r"/(attn/out|mlp/fc2)/kernel", P(None, "tensor", "fsdp")),
    (_LAYERS + r"/(attn/(q|k|v|out)|mlp/fc[12])/bias", P()),
    (_LAYERS + r"/norm[12]/(scale|bias)", P()),
    # Small tables and the patch kernel (0.6 M numbers) are whole on every chip.
    (r"vision/clip/(class_embedding|position_embedding|patch/kernel)", P()),
    (r"vision/clip/(pre_norm|post_norm)/(scale|bias)", P()),
]
"""Rules of the tower for `parallel.sharding`."""


class ClipAttention(nnx.Module):
    """Full self-attention with biases (HF: CLIPAttention)."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.q = Linear(width, width, bias=True, rngs=rngs)
        self.k = Linear(width, width, bias=True, rngs=rngs)
        self.v = Linear(width, width, bias=True, rngs=rngs)
        self.out = Linear(width, width, bias=True, rngs=rngs)

    def __call__(self, x: jax.Array, compute: Compute, key: jax.Array | None) -> jax.Array:
        """Attend within each crop; x [C, P + 1, D]."""
        keys = (None,) * 4 if key is None else tuple(jax.random.split(key, 4))
        shape = (*x.shape[:2], self.heads, -1)
        q, k, v = (
            linear(x, k).reshape(shape)
            for linear, k in zip((self.q, self.k, self.v), keys, strict=False)
        )
        y = attend(q, k, v, implementation=compute.attention)
        return self.out(y.reshape(x.shape), keys[3])


class ClipMlp(nnx.Module):
    """fc2(quick_gelu(fc1(x))) with quick_gelu(x) = x sigmoid(1.702 x)."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, bias=True, rngs=rngs)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, bias=True, rngs=rngs)

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Apply to x [..., D]."""
        first, second = (None, None) if key is None else jax.random.split(key)
        hidden = self.fc1(x, first)
        return self.fc2(hidden * jax.nn.sigmoid(1.702 * hidden), second)


class ClipBlock(nnx.Module):
    """One pre-norm layer (HF: CLIPEncoderLayer)."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = ClipAttention(config, rngs=rngs)
        self.norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ClipMlp(config, rngs=rngs)

    def __call__(self, x: jax.Array, compute: Compute, key: jax.Array | None = None) -> jax.Array:
        """Run on x [C, P + 1, D]."""
        attn_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        x = x + self.attn(self.norm1(x), compute, attn_key)
        return x + self.mlp(self.norm2(x), mlp_key)


class PatchEmbedding(nnx.Module):
    """Convolution whose stride is its size: a product per patch. Kernel [ph, pw, 3, D]."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        size = config.patch_size
        shape = (size, size, 3, config.hidden_size)
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), shape) * (size * size * 3) ** -0.5)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Patches [C, P, D], row by row, of pixels [C, side, side, 3]."""
        kernel = self.kernel[...]
        size, _, _, width = kernel.shape
        crops, side = pixels.shape[0], pixels.shape[1] // size
        x = pixels.reshape(crops, side, size, side, size, 3).swapaxes(2, 3)
        x = x.reshape(crops, side * side, size * size * 3)
        return x @ kernel.reshape(-1, width).astype(x.dtype)


class Clip(nnx.Module):
    """HF's CLIPVisionTransformer. `unused_layers` and `post_norm` never run.

    They are kept so that a checkpoint goes in and out whole.
    """

    def __init__(self, clip: ClipConfig, *, used: int, rngs: nnx.Rngs):
        """Make a tower.

        Args:
          clip: sizes.
          used: how many layers run (`ClipConfig.layers_used`).
          rngs: of the weights.
        """
        self.used = used
        self.class_embedding = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (clip.hidden_size,))
        )
        self.patch = PatchEmbedding(clip, rngs=rngs)
        self.position_embedding = nnx.Param(
            0.02
            * jax.random.normal(rngs.params(), (clip.patches_per_side**2 + 1, clip.hidden_size))
        )
        self.pre_norm = LayerNorm(clip.hidden_size, eps=clip.layer_norm_eps)
        unused = clip.num_hidden_layers - used
        self.layers = _stack(clip, used, rngs)
        if unused:
            self.unused_layers = _stack(clip, unused, rngs)
        self.post_norm = LayerNorm(clip.hidden_size, eps=clip.layer_norm_eps)

    def embed(self, pixels: jax.Array) -> jax.Array:
        """Class token and patches with positions, after the first norm: [C, P + 1, D]."""
        x = self.patch(pixels)
        first = jnp.broadcast_to(
            self.class_embedding[...].astype(x.dtype), (x.shape[0], 1, x.shape[2])
        )
        x = jnp.concatenate([first, x], axis=1)
        return self.pre_norm(x + self.position_embedding[...].astype(x.dtype))

    def __call__(self, pixels: jax.Array, compute: Compute, key: jax.Array | None = None):
        """Patch features [C, P, D] (HF: hidden_states[used] without the class token).

        Args:
          pixels: normalised [C, side, side, 3] in the dtype of the computation.
          compute: how to compute.
          key: dropout key of adapters, or None.
        """

        def body(x, layer, layer_key):
            # Crops lie row by row, so they are spread as the rows are.
            layer = gathered(layer, "vision/clip/layers", RULES, stacked=True)
            return constrain(layer(constrain(x, ROWS), compute, layer_key), ROWS)

        x = scan_layers(body, self.embed(pixels), self.layers, compute=compute.vision, key=key)
        return x[:, 1:]

    def hidden_states(self, pixels: jax.Array, compute: Compute) -> list[jax.Array]:
        """[C, P + 1, D] after the first norm and after each layer that is used: for tests."""
        states = [self.embed(pixels)]
        for index in range(self.used):
            states.append(layer_at(self.layers, index)(states[-1], compute))
        return states


def _stack(config: ClipConfig, depth: int, rngs: nnx.Rngs) -> ClipBlock:
    keys = jax.random.split(rngs.params(), depth)
    return jax.vmap(lambda key: ClipBlock(config, rngs=nnx.Rngs(params=key)))(keys)
