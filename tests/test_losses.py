# SPDX-License-Identifier: Apache-2.0
"""contrastive.py against the reference's values and gradients, masks, and sharded batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from safetensors.numpy import load_file

from vlm2vec_jax.losses import LossOptions, contrastive_loss
from vlm2vec_jax.parallel.mesh import batch_spec, make_mesh

MASKING = LossOptions(mask_duplicates=True)


@pytest.fixture(scope="module")
def golden(goldens):
    return load_file(goldens / "training" / "contrastive_loss.safetensors")


def _value_and_grads(q, t, **options):
    def loss(q, t):
        return contrastive_loss(q, t, **options)

    (value, metrics), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(q, t)
    return value, metrics, grads


def _close(ours, reference):
    """The goldens' tolerance for gradients: 1e-5 of the largest entry + 2e-5."""
    limit = 1e-5 * np.abs(reference).max() + 2e-5
    assert np.abs(np.asarray(ours) - reference).max() <= limit


@pytest.mark.parametrize("tau", ["0.02", "0.05", "1.0"])
@pytest.mark.parametrize("kind", ["", "_two_per_query"])
def test_golden_values_and_gradients(golden, tau, kind):
    q, p = golden["q"], golden["p" + kind]
    value, _, (dq, dp) = _value_and_grads(q, p, temperature=float(tau))
    np.testing.assert_allclose(value, golden[f"loss_tau{tau}{kind}"], rtol=1e-5)
    _close(dq, golden[f"grad_q_tau{tau}{kind}"])
    _close(dp, golden[f"grad_p_tau{tau}{kind}"])


@pytest.mark.parametrize("world", [2, 4])
def test_simulated_devices_give_the_references_distributed_gradients(golden, world):
    """The reference scales by the world size W for DDP; ours is the global mean as it is."""
    mesh = make_mesh(devices=jax.devices()[:world])
    spread = NamedSharding(mesh, batch_spec())
    q, p = jax.device_put((golden["q"], golden["p"]), spread)
    step = jax.jit(
        lambda q, p: _value_and_grads(q, p, temperature=0.02),
        in_shardings=(spread, spread),
        out_shardings=(None, None, (spread, spread)),
    )
    value, _, (dq, dp) = step(q, p)
    np.testing.assert_allclose(
        np.full(world, value), golden[f"ddp_w{world}_loss_per_rank"] / world, rtol=1e-5
    )
    for ours, name in ((dq, "q"), (dp, "p")):
        local = golden[f"ddp_w{world}_grad_{name}_local"] / world
        for shard in ours.addressable_shards:
            rank = shard.index[0].start // (8 // world)
            _close(np.asarray(shard.data), local[rank])


def test_eight_shards_equal_one_device():
    rng = np.random.default_rng(1)
    q, t = rng.normal(size=(16, 32)), rng.normal(size=(32, 32))
    q = (q / np.linalg.norm(q, axis=1, keepdims=True)).astype(np.float32)
    t = (t / np.linalg.norm(t, axis=1, keepdims=True)).astype(np.float32)
    ids = rng.integers(0, 20, size=32).astype(np.int32)
    valid = rng.random(32) > 0.2
    options = {"temperature": 0.05, "options": MASKING}

    def step(q, t, ids, valid):
        return _value_and_grads(q, t, target_id=ids, valid=valid, **options)

    alone = step(q, t, jnp.asarray(ids), jnp.asarray(valid))
    spread = NamedSharding(make_mesh(data=2, fsdp=4), batch_spec())
    together = jax.jit(step)(*jax.device_put((q, t, ids, valid), spread))
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_positive_index_and_default_agree(golden):
    q, p = golden["q"], golden["p_two_per_query"]
    explicit = contrastive_loss(q, p, temperature=0.05, positive=jnp.arange(8) * 2)[0]
    assert explicit == contrastive_loss(q, p, temperature=0.05)[0]
    order = np.random.default_rng(0).permutation(16)
    where = np.argsort(order)[np.arange(8) * 2]
    shuffled = contrastive_loss(q, p[order], temperature=0.05, positive=jnp.asarray(where))[0]
    np.testing.assert_allclose(shuffled, explicit, rtol=1e-6)


def test_padding_changes_nothing_and_gets_no_gradient(golden):
    q, p = golden["q"], golden["p"]
    plain, metrics, (dq, dp) = _value_and_grads(q, p, temperature=0.05)
    rubbish = np.full((3, q.shape[1]), np.nan, np.float32)
    keep = jnp.arange(11) < 8
    padded, padded_metrics, (pq, pp) = _value_and_grads(
        np.concatenate([q, rubbish]),
        np.concatenate([p, rubbish]),
        temperature=0.05,
        valid=keep,
        query_valid=keep,
    )
    np.testing.assert_allclose(padded, plain, rtol=1e-6)
    np.testing.assert_allclose(pq[:8], dq, atol=1e-7)
    np.testing.assert_allclose(pp[:8], dp, atol=1e-7)
    assert not np.any(pq[8:]) and not np.any(pp[8:])
    assert not np.any(padded_metrics["example_loss"][8:])
    padded_metrics["example_loss"] = padded_metrics["example_loss"][:8]
    for name in metrics:
        np.testing.assert_allclose(padded_metrics[name], metrics[name], rtol=1e-5, atol=1e-7)


def test_masks_that_mask_nothing_change_no_bit(golden):
    q, p = golden["q"], golden["p"]
    plain = contrastive_loss(q, p, temperature=0.02)[0]
    masked = contrastive_loss(
        q,
        p,
        temperature=0.02,
        target_id=jnp.arange(8),
        options=MASKING,
        valid=jnp.ones(8, bool),
        query_valid=jnp.ones(8, bool),
    )[0]
    assert plain == masked


def test_false_negatives_are_left_out(golden):
    q = golden["q"]
    t = golden["p"].copy()
    t[5] = t[2]
    ids = jnp.asarray([0, 1, 2, 3, 4, 2, 6, 7])
    masked, metrics, _ = _value_and_grads(q, t, temperature=0.05, target_id=ids, options=MASKING)
    logits = (q.astype(np.float64) @ t.T.astype(np.float64)) / 0.05
    logits[2, 5] = logits[5, 2] = -np.inf
    expected = np.mean(np.log(np.exp(logits).sum(1)) - np.diag(logits))
    np.testing.assert_allclose(masked, expected, rtol=1e-5)
    assert metrics["duplicate_targets"] == pytest.approx(1 / 8)
    unmasked = contrastive_loss(q, t, temperature=0.05, target_id=ids)[0]
    np.testing.assert_allclose(unmasked, contrastive_loss(q, t, temperature=0.05)[0], rtol=0)
    assert unmasked > masked


def test_rows_without_anything_give_zero_not_nan():
    q = jnp.eye(3, 4)
    for options in (
        {"query_valid": jnp.zeros(3, bool)},
        {"valid": jnp.zeros(3, bool)},
        {"target_id": jnp.zeros(3, jnp.int32), "options": MASKING},
    ):
        value, metrics, grads = _value_and_grads(q, q, temperature=0.02, **options)
        assert value == 0.0
        assert not np.any(grads[0]) and not np.any(grads[1])
        assert all(np.all(np.isfinite(v)) for v in metrics.values())


def test_metrics_by_hand():
    q = jnp.asarray([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    t = jnp.asarray([[2.0, 0.0], [1.0, 0.0], [2.0, 0.0]])  # not normalised: cosines still are
    _, metrics, _ = _value_and_grads(q, t, temperature=1.0)
    assert metrics["accuracy"] == 0.0  # rows 0 and 2 tie with each other's target
    assert metrics["positive_cosine"] == pytest.approx(2 / 3)
    assert metrics["negative_cosine"] == pytest.approx(4 / 6)
    _, metrics, _ = _value_and_grads(q, t, temperature=1.0, target_id=jnp.asarray([7, 8, 7]))
    assert metrics["accuracy"] == pytest.approx(2 / 3)  # the tie is between equals
    assert metrics["duplicate_targets"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("form", ["dense", "tiled"])
def test_losses_of_examples_make_the_loss(golden, form):
    q, p = golden["q"], golden["p"]
    counts = jnp.arange(len(q)) != 1
    loss, metrics = contrastive_loss(
        q, p, temperature=0.05, query_valid=counts, options=LossOptions(form=form, tile=8)
    )
    each = metrics["example_loss"]
    assert each.shape == (len(q),) and each[1] == 0
    np.testing.assert_allclose(each.sum() / counts.sum(), loss, rtol=1e-6)
    alone = jnp.where(jnp.arange(len(q)) == 2, True, False)
    only, _ = contrastive_loss(q, p, temperature=0.05, query_valid=alone)
    np.testing.assert_allclose(each[2], only, rtol=1e-5)


def test_low_precision_inputs_are_computed_in_float32(golden):
    q, p = (jnp.asarray(golden[k], jnp.bfloat16) for k in "qp")
    value, _, (dq, _) = _value_and_grads(q, p, temperature=0.02)
    exact = contrastive_loss(q.astype(jnp.float32), p.astype(jnp.float32), temperature=0.02)[0]
    assert value.dtype == jnp.float32 and dq.dtype == jnp.bfloat16
    assert value == exact


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="expected"):
        contrastive_loss(jnp.ones((2, 3)), jnp.ones((2, 4)), temperature=1.0)
    with pytest.raises(ValueError, match="give `positive`"):
        contrastive_loss(jnp.ones((3, 3)), jnp.ones((2, 3)), temperature=1.0)
    with pytest.raises(ValueError, match="target_id"):
        contrastive_loss(jnp.ones((2, 3)), jnp.ones((2, 3)), temperature=1.0, options=MASKING)
