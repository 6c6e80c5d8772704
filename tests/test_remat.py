# SPDX-License-Identifier: Apache-2.0
"""What is kept for the backward pass changes memory and time, never a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_tools import QUICK, encode, mini_model, pairs, train_batch

from vlm2vec_jax.models.loading import load_model, split_trainable
from vlm2vec_jax.nn.compute import Compute, scan_layers
from vlm2vec_jax.training.step import StepSpec, loss_and_grads

DEPTH, ROWS, WIDTH = 6, 64, 128


def body(x, layer, key):
    hidden = jax.nn.gelu(jnp.tanh(x @ layer["a"]))
    return x + jnp.sin(hidden) @ layer["b"]


def compiled(remat):
    """The gradient of a stack of layers, compiled, and its operands."""
    rng = np.random.default_rng(0)
    layers = {n: jnp.asarray(rng.normal(size=(DEPTH, WIDTH, WIDTH)), jnp.float32) for n in "ab"}
    layers = jax.tree.map(lambda w: w / WIDTH, layers)
    x = jnp.asarray(rng.normal(size=(ROWS, WIDTH)), jnp.float32)

    def total(layers, x):
        return (scan_layers(body, x, layers, compute=Compute(remat=remat)) ** 2).sum()

    return jax.jit(jax.grad(total)).lower(layers, x).compile(), (layers, x)


def test_less_is_kept_and_gradients_are_the_same():
    stream = DEPTH * ROWS * WIDTH * 4
    program, operands = compiled("none")
    expected = program(*operands)
    kept = {"none": program.memory_analysis().temp_size_in_bytes}
    for remat in ("dots", "full", "offload"):
        program, operands = compiled(remat)
        kept[remat] = program.memory_analysis().temp_size_in_bytes
        for name, found in program(*operands).items():
            np.testing.assert_allclose(found, expected[name], atol=2e-6, err_msg=remat)
    assert kept["none"] > kept["dots"] > kept["full"] > stream


@pytest.mark.slow
def test_gradients_of_a_model_are_the_same(tmp_path):
    """Vision tower and decoder, each with a policy of its own, over packed rows."""
    folder = mini_model(tmp_path)
    model = load_model(folder, dtype_of=lambda path: jnp.dtype("float32"))
    processor = model.backbone.processor(folder, model.config, num_crops=2, max_len=64)
    batch = train_batch(processor, encode(processor, *pairs(6)))
    graphdef, params, frozen = split_trainable(model, full=True)

    def grads(remat, vision):
        spec = StepSpec(Compute(remat=remat, remat_vision=vision), cached=False)

        def run(params):
            return loss_and_grads(graphdef, spec, params, frozen, batch, jax.random.key(0))[2]

        return jax.jit(run).lower(params).compile(QUICK)(params)

    expected = grads("none", None)
    for remat, vision in (("dots", "full"), ("offload", "none"), ("full", "offload")):
        for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(grads(remat, vision))):
            largest = float(jnp.abs(one).max())
            np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5 * largest + 1e-7)
