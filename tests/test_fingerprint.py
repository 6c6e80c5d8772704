# SPDX-License-Identifier: Apache-2.0
"""fingerprint.py: checksums see contents and position only; differences are told by field."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vlm2vec_jax.parallel.mesh import make_mesh
from vlm2vec_jax.training.fingerprint import digest, explain_difference


def test_digest_sees_position_and_not_the_mesh():
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    mesh = make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])
    spread = jax.device_put(x, NamedSharding(mesh, P("fsdp", "tensor")))
    reference = digest({"a": x})
    assert digest({"a": spread}) == reference
    assert reference["a"] | {"sum": 0} == {"shape": [4, 6], "dtype": "float32", "sum": 0}
    for changed in (x[::-1], x[:, ::-1], x + np.float32(1e-6), np.where(x == 5, -x, x)):
        assert digest({"a": changed})["a"]["sum"] != reference["a"]["sum"]
    swapped = x.copy()
    swapped[0, 0], swapped[3, 5] = x[3, 5], x[0, 0]
    assert digest({"a": swapped})["a"]["sum"] != reference["a"]["sum"]
    kinds = {"b": np.array([True, False]), "h": np.ones(3, jnp.bfloat16), "i": np.int32(3)}
    assert {k: v["dtype"] for k, v in digest(kinds).items()} == {
        "b": "bool",
        "h": "bfloat16",
        "i": "int32",
    }


def test_differences_are_explained_field_by_field():
    saved = {"optim": {"lr": 1e-5, "clip": 1.0}, "data": {"subsets": ["A"]}, "steps": 10, "old": 1}
    now = {"optim": {"lr": 2e-5, "clip": 1.0}, "data": {"subsets": ("A",)}, "steps": 20, "new": 2}
    assert explain_difference(saved, saved) == []
    assert explain_difference(saved, now, ignore=("steps",)) == [
        "new: not in the checkpoint, 2 now",
        "old: 1 in the checkpoint, gone now",
        "optim.lr: 1e-05 in the checkpoint, 2e-05 now",
    ]
    assert explain_difference(saved, now, ignore=("optim", "steps", "old", "new")) == []
