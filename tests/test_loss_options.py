# SPDX-License-Identifier: Apache-2.0
"""Every option of the loss against a slow oracle, and the three forms against each other."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vlm2vec_jax.losses import LossOptions, choose_form, contrastive_loss
from vlm2vec_jax.parallel.mesh import ROWS, make_mesh

ROWS_, EXTRA, WIDTH, T = 8, 2, 12, 0.1
"""Queries, columns for hard negatives behind each target, width, temperature."""

VARIANTS = {
    "plain": {},
    "both directions": {"symmetric": True},
    "false negatives": {"mask_duplicates": True, "same_query": "mask", "margin": 0.05},
    "several positives": {"mask_duplicates": True, "same_query": "positive", "symmetric": True},
    "own negatives": {"private_negatives": True, "same_source": True},
    "hardness": {"hardness": 3.0, "symmetric": True},
    "prefixes": {"widths": (4, 7), "margin": 0.02},
    "everything": {
        "symmetric": True,
        "mask_duplicates": True,
        "same_query": "positive",
        "margin": 0.1,
        "same_source": True,
        "private_negatives": True,
        "hardness": 2.0,
        "widths": (5,),
    },
}


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


@functools.cache
def batch():
    """Queries, columns (target, then hard negatives of each row) and what is known of them."""
    rng = np.random.default_rng(3)
    q, t = unit(rng, ROWS_, WIDTH), unit(rng, ROWS_ * (1 + EXTRA), WIDTH)
    t[0::3] = 0.6 * t[0::3] + 0.4 * q  # positives are near, so that margins decide something
    t = (t / np.linalg.norm(t, axis=1, keepdims=True)).astype(np.float32)
    ids = np.arange(len(t), dtype=np.int32)
    ids[6] = ids[0]  # row 2 has the target of row 0
    ids[15] = ids[3]  # row 5 that of row 1
    ids[10] = ids[0]  # and a hard negative of row 3 is that target, too
    t[6], t[15], t[10] = t[0], t[3], t[0]
    owner = np.where(np.arange(len(t)) % 3 == 0, -1, np.arange(len(t)) // 3).astype(np.int32)
    valid = np.ones(len(t), bool)
    valid[[2, 4, 5, 14]] = False  # ragged: two, one or no negatives
    known = np.full((ROWS_, 2), -1, np.int32)
    known[:, 0] = ids[::3]
    known[1, 1], known[4, 1] = ids[12], ids[3]  # rows 1 and 4 are the same query
    source = np.array([0, 0, 0, 1, 0, 1, 1, 1], np.int32)
    counted = np.ones(ROWS_, bool)
    counted[7] = False
    return {"q": q, "t": t}, {
        "target_id": ids,
        "known": known,
        "source": source,
        "owner": owner,
        "valid": valid,
        "query_valid": counted,
    }


def oracle(q, t, facts, options: LossOptions) -> float:
    """The definition, row by row in float64."""
    q, t = q.astype(np.float64), t.astype(np.float64)
    widths = [*options.widths, q.shape[1]]
    return float(np.mean([_oracle_width(q[:, :w], t[:, :w], facts, options) for w in widths]))


def _oracle_width(q, t, facts, options):
    q = q / np.linalg.norm(q, axis=1, keepdims=True)
    t = t / np.linalg.norm(t, axis=1, keepdims=True)
    ids, known, owner, valid = (facts[k] for k in ("target_id", "known", "owner", "valid"))
    source, rows = facts["source"], range(len(q))
    counted = [i for i in rows if facts["query_valid"][i] and valid[3 * i]]

    def term(s, own, positives, negatives):
        logit = {j: s[j] / T for j in positives}
        logit |= {j: s[j] / T + options.hardness * s[j] for j in negatives}
        total = math.log(sum(math.exp(v) for v in logit.values()))
        return total - np.mean([logit[j] for j in positives])

    def sort(s, own, candidates, same, more):
        """Positives and negatives among candidates other than its own."""
        positives = [own]
        negatives = []
        for j in candidates:
            if more(j) and not same(j) and options.same_query == "positive":
                positives.append(j)
                continue
            out = same(j) and options.mask_duplicates
            out |= more(j) and not same(j) and options.same_query != "negative"
            out |= options.margin is not None and s[j] > s[own] + options.margin
            if not out:
                negatives.append(j)
        return positives, negatives

    forward = []
    for i in counted:
        s, own = t @ q[i], 3 * i
        seen = [j for j in range(len(t)) if valid[j] and j != own]
        if options.private_negatives:
            seen = [j for j in seen if owner[j] in (-1, i)]
        if options.same_source:
            seen = [j for j in seen if source[j // 3] == source[i]]
        same = lambda j: ids[j] == known[i][0]  # noqa: B023, E731
        more = lambda j: ids[j] in [k for k in known[i] if k >= 0]  # noqa: B023, E731
        forward.append(term(s, own, *sort(s, own, seen, same, more)))
    if not options.symmetric:
        return np.mean(forward)
    backward = []
    for i in counted:
        s = q @ t[3 * i]
        seen = [k for k in rows if facts["query_valid"][k] and k != i]
        if options.same_source:
            seen = [k for k in seen if source[k] == source[i]]
        target = ids[3 * i]
        same = lambda k: known[k][0] == target  # noqa: B023, E731
        more = lambda k: target in known[k]  # noqa: B023, E731
        backward.append(term(s, i, *sort(s, i, seen, same, more)))
    return (np.mean(forward) + np.mean(backward)) / 2


def evaluate(options: LossOptions, vectors, facts, mesh=None):
    """Loss, metrics and gradients for q, t and the logarithm of the temperature."""

    def loss(vectors, warmth):
        return contrastive_loss(
            vectors["q"], vectors["t"], temperature=T * jnp.exp(warmth), options=options, **facts
        )

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    if mesh is None:
        (value, metrics), grads = step(vectors, jnp.float32(0))
    else:
        with jax.set_mesh(mesh):
            spread = NamedSharding(mesh, P(ROWS))
            (value, metrics), grads = step(jax.device_put(vectors, spread), jnp.float32(0))
    return jax.device_get((value, metrics, grads))


@functools.cache
def dense(name):
    return evaluate(LossOptions(**VARIANTS[name], negatives=EXTRA), *batch())


@pytest.mark.parametrize("name", VARIANTS)
def test_dense_is_the_definition(name):
    value, _, grads = dense(name)
    vectors, facts = batch()
    options = LossOptions(**VARIANTS[name])
    assert value == pytest.approx(oracle(**vectors, facts=facts, options=options), rel=2e-6)
    # Padding gets no gradient, everything else does.
    assert not grads[0]["t"][~facts["valid"]].any() and not grads[0]["q"][7].any()
    assert grads[0]["q"][:7].any(axis=1).all() and grads[1] != 0


def test_every_option_changes_the_loss():
    values = [float(dense(name)[0]) for name in VARIANTS]
    assert len(set(values)) == len(values)


FORMS = [
    ("tiled", None, 3),
    ("tiled", None, 64),
    ("tiled", (8, 1, 1), 2),
    ("ring", (8, 1, 1), 2),
    ("ring", (2, 2, 2), 5),
    ("ring", None, 5),
]


@pytest.mark.parametrize(
    ("name", "form", "mesh", "tile"),
    [
        pytest.param(name, *form, marks=() if name == "everything" else pytest.mark.slow)
        for name in VARIANTS
        for form in (FORMS if name in ("everything", "plain") else (FORMS[0], FORMS[4]))
    ],
)
def test_forms_agree(name, form, mesh, tile):
    options = LossOptions(**VARIANTS[name], negatives=EXTRA, form=form, tile=tile)
    found = evaluate(options, *batch(), mesh and make_mesh(*mesh))
    expected = dense(name)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    for ours, wanted in zip(jax.tree.leaves(found[2]), jax.tree.leaves(expected[2]), strict=True):
        np.testing.assert_allclose(ours, wanted, atol=1e-6 * max(1, np.abs(wanted).max()))
    for key, wanted in expected[1].items():
        assert found[1][key] == pytest.approx(wanted, abs=1e-6), key


@pytest.mark.parametrize(("form", "mesh"), [("tiled", None), ("ring", (4, 2, 1))])
def test_a_batch_at_the_usual_temperature(form, mesh):
    """Wider and sharper: logits up to 50, tiles that do not divide the batch."""
    rng = np.random.default_rng(0)
    vectors = {"q": unit(rng, 40, 64), "t": unit(rng, 40, 64)}
    facts = {"target_id": jnp.arange(40)}

    def run(form, mesh):
        def loss(v):
            options = LossOptions(form=form, tile=3)
            return contrastive_loss(v["q"], v["t"], temperature=0.02, options=options, **facts)[0]

        with jax.set_mesh(mesh or make_mesh(1, 1, 1, devices=jax.devices()[:1])):
            return jax.device_get(jax.jit(jax.value_and_grad(loss))(vectors))

    found, wanted = run(form, mesh and make_mesh(*mesh)), run("dense", None)
    assert found[0] == pytest.approx(wanted[0], rel=1e-6)
    for side in "qt":
        scale = np.abs(wanted[1][side]).max()
        np.testing.assert_allclose(found[1][side], wanted[1][side], atol=2e-6 * scale)


def test_no_negative_is_never_an_embedding_of_nothing():
    """A row without hard negatives has columns that nobody sees, whatever stands in them."""
    vectors, facts = batch()
    other = dict(vectors, t=np.where(facts["valid"][:, None], vectors["t"], np.float32(np.nan)))
    assert evaluate(LossOptions(negatives=EXTRA), other, facts)[0] == dense("plain")[0]


def test_nothing_left_gives_zero_and_no_nan():
    vectors, facts = batch()
    facts = facts | {"source": np.arange(ROWS_, dtype=np.int32)}
    for form in ("dense", "tiled"):
        options = LossOptions(same_source=True, private_negatives=True, form=form, negatives=EXTRA)
        facts_ = facts | {"valid": np.arange(len(vectors["t"])) % 3 == 0}
        value, metrics, grads = evaluate(options, vectors, facts_)
        assert value == 0 and not any(np.any(g) for g in jax.tree.leaves(grads))
        assert metrics["accuracy"] == 1 and all(np.all(np.isfinite(v)) for v in metrics.values())


def test_wrong_demands_are_refused():
    q = jnp.ones((2, 3))
    for options, said in (
        (LossOptions(same_query="mask"), "target_id"),
        (LossOptions(same_source=True), "source"),
        (LossOptions(widths=(4,)), "not within 1..3"),
    ):
        with pytest.raises(ValueError, match=said):
            contrastive_loss(q, q, temperature=1.0, options=options)


def test_the_form_follows_batch_and_memory():
    gib = 2**30
    assert choose_form(1024, 1024, 3072, 64, 16 * gib) == "dense"
    assert choose_form(16384, 16384, 3072, 1, 16 * gib) == "tiled"
    assert choose_form(16384, 16384, 3072, 64, 16 * gib) == "tiled"
    assert choose_form(131072, 131072, 3072, 64, 16 * gib) == "ring"
    assert choose_form(131072, 131072, 3072, 1, 16 * gib) == "tiled"
    assert choose_form(16384, 16384, 3072, 8, 144 * gib) == "dense"


def memory(rows: int, width: int, form: str, mesh=None) -> int:
    """Bytes of a device for loss and gradient, as the compiler plans them."""

    def loss(q, t, ids):
        options = LossOptions(form=form, mask_duplicates=True)
        return contrastive_loss(q, t, temperature=0.02, target_id=ids, options=options)[0]

    mesh = mesh or make_mesh(1, 1, 1, devices=jax.devices()[:1])
    vectors = jax.ShapeDtypeStruct(
        (rows, width), jnp.float32, sharding=NamedSharding(mesh, P(ROWS))
    )
    ids = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        step = jax.jit(
            jax.value_and_grad(loss, argnums=(0, 1)),
            out_shardings=(None, (vectors.sharding, vectors.sharding)),
        )
        planned = step.lower(vectors, vectors, ids).compile().memory_analysis()
    return (
        planned.argument_size_in_bytes + planned.temp_size_in_bytes + planned.output_size_in_bytes
    )


def test_a_batch_of_131072_fits():
    """Embeddings and their gradients alone are 6.4 GB; the matrix would be 69 GB."""
    needed = memory(131072, 3072, "tiled")
    assert 6.4e9 < needed < 16e9, needed
    ring = memory(131072, 3072, "ring", make_mesh(8, 1, 1))
    assert ring < 3e9, ring
