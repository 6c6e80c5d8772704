# SPDX-License-Identifier: Apache-2.0
"""optimizer.py against HF's formulas, the golden trainer's rates and a numpy AdamW."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.training.optimizer import (
    AdamW,
    decay_mask,
    global_norm,
    is_decayed,
    make_schedule,
)

GOLDEN = Path(__file__).parent / "goldens" / "training" / "training.json"


def test_linear_schedule_is_the_golden_trainers():
    trainer = json.loads(GOLDEN.read_text())["trainer"]
    args = trainer["args"]
    schedule = make_schedule(
        args["lr_scheduler_type"], args["learning_rate"], args["warmup_steps"], args["max_steps"]
    )
    ours = [float(schedule(step)) for step in range(args["max_steps"])]
    np.testing.assert_allclose(ours, trainer["lr_used_at_step"], rtol=1e-6, atol=1e-12)
    assert ours[0] == 0.0
    assert float(schedule(args["max_steps"])) == 0.0


@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_schedules_follow_hf_formulas(warmup):
    lr, steps = 3e-4, 20

    def hf(kind, step):
        if step < warmup:
            return lr * step / max(1, warmup)
        if kind == "constant":
            return lr
        if kind == "linear":
            return lr * max(0.0, (steps - step) / max(1, steps - warmup))
        progress = (step - warmup) / max(1, steps - warmup)
        return lr * max(0.0, 0.5 * (1.0 + math.cos(math.pi * 0.5 * 2.0 * progress)))

    for kind in ("linear", "cosine", "constant"):
        schedule = make_schedule(kind, lr, warmup, steps)
        for step in range(steps + 1):
            np.testing.assert_allclose(float(schedule(step)), hf(kind, step), atol=1e-10)
        # Past the end (a run that is extended) the rate never rises or turns negative.
        assert 0.0 <= float(schedule(steps + 9)) <= float(schedule(steps)) + 1e-12


def test_schedule_problems_are_told_together():
    with pytest.raises(UserError) as caught:
        make_schedule("polynomial", -1.0, -3, 20)
    for word in ("polynomial", "optim.lr", "optim.warmup_steps"):
        assert word in str(caught.value)


def test_a_run_may_end_within_the_warm_up():
    schedule = make_schedule("linear", 1.0, 200, 20)
    assert [float(schedule(step)) for step in (0, 10, 20)] == pytest.approx([0.0, 0.05, 0.1])


def _numpy_adamw(params, grads_per_step, lrs, decay, clip, decayed):
    """torch.optim.AdamW after clip_grad_norm_, in float64."""
    params = {k: v.astype(np.float64) for k, v in params.items()}
    m = {k: np.zeros_like(v) for k, v in params.items()}
    v = {k: np.zeros_like(p) for k, p in params.items()}
    norms = []
    for number, (grads, lr) in enumerate(zip(grads_per_step, lrs, strict=True), start=1):
        norm = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in grads.values()))
        norms.append(norm)
        factor = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        for key in params:
            g = grads[key].astype(np.float64) * factor
            params[key] *= 1 - lr * (decay if key in decayed else 0.0)
            m[key] = 0.9 * m[key] + 0.1 * g
            v[key] = 0.999 * v[key] + 0.001 * g * g
            denominator = np.sqrt(v[key]) / math.sqrt(1 - 0.999**number) + 1e-8
            params[key] -= lr / (1 - 0.9**number) * m[key] / denominator
    return params, norms


@pytest.mark.parametrize("clip", [1.0, 1e6, None])
def test_updates_equal_numpy_adamw(clip):
    rng = np.random.default_rng(0)
    shapes = {"decoder/norm/scale": (5,), "mlp/fc1/kernel": (4, 3), "mlp/fc1/bias": (3,)}
    params = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    grads = [
        {k: (10.0 * rng.normal(size=s)).astype(np.float32) for k, s in shapes.items()}
        for _ in range(6)
    ]
    schedule = make_schedule("linear", 1e-2, 2, 6)
    optimizer = AdamW(schedule, weight_decay=0.1, clip_norm=clip)
    ours = {k: jnp.asarray(v) for k, v in params.items()}
    state = optimizer.init(ours)
    update = jax.jit(optimizer.update)
    lrs, norms = [], []
    for step, grad in enumerate(grads):
        before = ours
        ours, state, info = update(grad, state, ours)
        lrs.append(float(info["lr"]))
        norms.append(float(info["grad_norm"]))
        if step == 0:  # rate 0: nothing moves, but the moments fill
            for key in ours:
                np.testing.assert_array_equal(ours[key], before[key])
                assert float(jnp.abs(state.mu[key]).max()) > 0
    expected, expected_norms = _numpy_adamw(
        params, grads, lrs, 0.1, clip, {"decoder/norm/scale", "mlp/fc1/kernel"}
    )
    np.testing.assert_allclose(norms, expected_norms, rtol=1e-6)
    for key in ours:
        np.testing.assert_allclose(ours[key], expected[key], atol=2e-7, rtol=1e-6)
    assert int(state.count) == 6


def test_clipping_divides_by_the_norm_plus_1e6th():
    optimizer = AdamW(make_schedule("constant", 0.0, 0, 1), clip_norm=1e-6)
    params = {"w": jnp.zeros(1)}
    _, state, info = optimizer.update({"w": jnp.full(1, 1e-6)}, optimizer.init(params), params)
    assert float(info["grad_norm"]) == pytest.approx(1e-6)
    # factor 1e-6 / (1e-6 + 1e-6) = 0.5, which plain division by the norm would not give
    assert float(state.mu["w"][0]) == pytest.approx(0.1 * 0.5e-6, rel=1e-5)


def test_decay_rule_gives_the_goldens_groups():
    """HF's split of the reference's tiny_mha: 46 decayed parameters, 36 others."""
    names = set()
    per_layer = [f"attn/{n}/{k}" for n in ("q", "k", "v", "out") for k in ("kernel", "bias")]
    per_layer += [f"mlp/{n}/{k}" for n in ("fc1", "fc2") for k in ("kernel", "bias")]
    per_layer += [f"{n}/{k}" for n in ("norm1", "norm2") for k in ("scale", "bias")]
    for layer in range(3):
        names |= {f"vision/clip/layers{layer}/{n}" for n in per_layer}
        names |= {
            f"decoder/layers{layer}/{n}"
            for n in ("input_norm/scale", "post_norm/scale", "attn/qkv/kernel")
            + ("attn/out/kernel", "mlp/gate_up/kernel", "mlp/down/kernel")
        }
    names |= {f"vision/clip/{n}/{k}" for n in ("pre_norm", "post_norm") for k in ("scale", "bias")}
    names |= {f"vision/projector/{n}/{k}" for n in ("fc1", "fc2") for k in ("kernel", "bias")}
    names |= {f"vision/clip/{n}" for n in ("class_embedding", "patch/kernel", "position_embedding")}
    names |= {"vision/newline", "vision/separator", "embed/table", "lm_head/kernel"}
    names |= {"decoder/norm/scale"}
    groups = json.loads(GOLDEN.read_text())["trainer"]["optimizer"]["groups"]
    decayed = sum(is_decayed(name, names) for name in names)
    assert [decayed, len(names) - decayed] == [group["n_params"] for group in groups]


def test_decay_mask_reads_nested_and_flat_trees():
    nested = {"norm": {"scale": jnp.ones(2), "bias": jnp.ones(2)}, "rms": {"scale": jnp.ones(2)}}
    assert decay_mask(nested) == {"norm": {"scale": False, "bias": False}, "rms": {"scale": True}}
    flat = {"norm/scale": jnp.ones(2), "norm/bias": jnp.ones(2), "x/lora_a": jnp.ones(2)}
    assert decay_mask(flat) == {"norm/scale": False, "norm/bias": False, "x/lora_a": True}


def test_decay_mask_reads_nnx_states():
    class Norm(nnx.Module):
        def __init__(self, bias):
            self.scale = nnx.Param(jnp.ones(2))
            if bias:
                self.bias = nnx.Param(jnp.ones(2))

    class Both(nnx.Module):
        def __init__(self):
            self.layer, self.rms = Norm(True), Norm(False)

    mask = decay_mask(nnx.split(Both())[1])
    assert nnx.to_pure_dict(mask) == {
        "layer": {"bias": False, "scale": False},
        "rms": {"scale": True},
    }


def test_trained_parameters_must_be_float32():
    optimizer = AdamW(make_schedule("constant", 1.0, 0, 1))
    with pytest.raises(UserError, match="a/kernel is bfloat16"):
        optimizer.init({"a": {"kernel": jnp.zeros(2, jnp.bfloat16)}, "b": jnp.zeros(1)})


def test_moments_are_float32_for_low_precision_gradients():
    optimizer = AdamW(make_schedule("constant", 1e-3, 0, 1))
    params = {"w": jnp.ones(4)}
    params, state, info = optimizer.update(
        {"w": jnp.ones(4, jnp.bfloat16)}, optimizer.init(params), params
    )
    assert state.mu["w"].dtype == state.nu["w"].dtype == params["w"].dtype == jnp.float32
    assert info["grad_norm"] == pytest.approx(2.0)
    assert float(global_norm({"a": jnp.full(3, 2.0), "b": jnp.full(1, 2.0)})) == 4.0


def test_state_shardings_have_the_states_structure():
    optimizer = AdamW(make_schedule("constant", 1e-3, 0, 1))
    state = optimizer.init({"w": jnp.ones(4)})
    placed = optimizer.state_shardings({"w": "here"}, "scalar")
    assert jax.tree.structure(placed) == jax.tree.structure(state)
