# SPDX-License-Identifier: Apache-2.0
"""AdamW, gradient clipping and learning-rate schedules, as the reference's trainer runs them.

The reference trains with HF's `Trainer` (transformers 4.46): `torch.optim.AdamW` with betas
(0.9, 0.999) and eps 1e-8, decoupled weight decay, `torch.nn.utils.clip_grad_norm_`, and a
schedule from `transformers.optimization` that multiplies the learning rate. The first update
has the schedule's value at 0, so with warm-up it changes nothing but fills the moments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from vlm2vec_jax.errors import raise_problems
from vlm2vec_jax.training.fingerprint import leaf_path

SCHEDULES = ("linear", "cosine", "constant")
BETAS = (0.9, 0.999)
EPS = 1e-8

Schedule = Callable[[Any], jax.Array]
"""Number of an update, from 0 (int or traced i32), to the learning rate used in it (f32)."""


def make_schedule(kind: str, lr: float, warmup_steps: int, steps: int) -> Schedule:
    """The learning rate by update number, as HF's `get_scheduler`.

    Args:
      kind: `linear` (to 0 at `steps`), `cosine` (half a period, to 0 at `steps`) or `constant`;
        each climbs linearly from 0 over the first `warmup_steps` updates.
      lr: the peak.
      warmup_steps: updates with less than the peak; 0 for none.
      steps: updates in the whole run.

    Raises:
      UserError: for an unknown kind or impossible numbers.
    """
    problems = []
    if kind not in SCHEDULES:
        problems.append(f"optim.schedule {kind!r} is unknown; known: {', '.join(SCHEDULES)}")
    if not lr >= 0:
        problems.append(f"optim.lr {lr!r} must not be negative")
    if steps < 1:
        problems.append(f"steps {steps!r} must be at least 1")
    if warmup_steps < 0:
        problems.append(f"optim.warmup_steps {warmup_steps!r} must not be negative")
    raise_problems("the learning-rate schedule is not possible", problems)

    def schedule(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        climbing = step / max(1, warmup_steps)
        left = max(1, steps - warmup_steps)
        if kind == "linear":
            after = jnp.maximum(0.0, (steps - step) / left)
        elif kind == "cosine":
            progress = jnp.minimum((step - warmup_steps) / left, 1.0)
            after = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        else:
            after = jnp.ones_like(step)
        return jnp.float32(lr) * jnp.where(step < warmup_steps, climbing, after)

    return schedule


def is_decayed(path: str, paths: Collection[str]) -> bool:
    """Whether weight decay applies to a parameter, by the rule of HF's `Trainer`.

    HF leaves out biases and the weights of `nn.LayerNorm`, and nothing else: the backbone's
    RMSNorm is a class of its own and is decayed, as are class and position embeddings, the
    newline and separator vectors and all adapter parameters (the goldens' optimizer groups have
    46 decayed and 36 other parameters, which only this rule gives). In our tree a LayerNorm is a
    `scale` that has a `bias` beside it.

    Args:
      path: as `vision/clip/layers/norm1/scale`.
      paths: all paths of the model (a set: it is asked for siblings).
    """
    parent, _, leaf = path.rpartition("/")
    if leaf == "bias":
        return False
    return not (leaf == "scale" and f"{parent}/bias" in paths)


def decay_mask(params: Any) -> Any:
    """A tree like `params` (flat dict of paths, nested dicts, nnx State) of `is_decayed`."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths = [leaf_path(key) for key, _ in leaves]
    known = set(paths)
    return jax.tree.unflatten(treedef, [is_decayed(path, known) for path in paths])


def global_norm(tree: Any) -> jax.Array:
    """L2 norm over all leaves together, computed in float32."""
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, start=jnp.float32(0.0)))


@dataclasses.dataclass(frozen=True)
class AdamW:
    """AdamW with clipping, over the trained parameters only (frozen ones never come here).

    The state is `optax.ScaleByAdamState(count, mu, nu)`: `count` (i32) is the number of updates
    made and thereby the schedule's position; `mu` and `nu` are float32 and shaped like the
    parameters.

    Attributes:
      schedule: from `make_schedule`.
      weight_decay: decoupled; applies where `is_decayed` says so.
      clip_norm: the gradient's norm is brought down to this; None or 0 for no clipping.
      betas: decay of the two moments.
      eps: added to the root of the second moment.
    """

    schedule: Schedule
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    betas: tuple[float, float] = BETAS
    eps: float = EPS

    def init(self, params: Any) -> optax.ScaleByAdamState:
        """Zero moments; works under `jax.eval_shape` and `jit`.

        Raises:
          UserError: if a parameter is not float32 (steps of 2e-5 would be lost in bfloat16).
        """
        leaves = jax.tree_util.tree_leaves_with_path(params)
        raise_problems(
            "trained parameters must be float32",
            [
                f"{leaf_path(key)} is {leaf.dtype}"
                for key, leaf in leaves
                if leaf.dtype != jnp.float32
            ],
        )
        return cast(optax.ScaleByAdamState, self._adam().init(params))

    def update(
        self, grads: Any, state: optax.ScaleByAdamState, params: Any
    ) -> tuple[Any, optax.ScaleByAdamState, dict[str, jax.Array]]:
        """One update.

        Args:
          grads: like `params`; any float dtype.
          state: from `init` or the last update.
          params: float32.

        Returns:
          New parameters, new state, and f32 scalars: `grad_norm` (before clipping) and `lr` (used
          in this update).
        """
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        norm = global_norm(grads)
        if self.clip_norm:
            # torch's clip_grad_norm_: always multiplied, with a factor of 1 at most.
            factor = jnp.minimum(self.clip_norm / (norm + 1e-6), 1.0)
            grads = jax.tree.map(lambda g: g * factor, grads)
        lr = self.schedule(state.count)
        steps, new_state = self._adam().update(grads, state)
        mask = decay_mask(params)
        params = jax.tree.map(
            lambda p, s, decayed: p * (1.0 - lr * self.weight_decay * decayed) - lr * s,
            params,
            steps,
            mask,
        )
        info = {"grad_norm": norm, "lr": lr}
        return params, cast(optax.ScaleByAdamState, new_state), info

    def state_shardings(self, param_shardings: Any, scalar: Any) -> optax.ScaleByAdamState:
        """Shardings of the state: moments as their parameters, the count as `scalar`.

        Args:
          param_shardings: a tree like the parameters.
          scalar: the sharding of a replicated scalar.
        """
        return optax.ScaleByAdamState(count=scalar, mu=param_shardings, nu=param_shardings)

    def _adam(self) -> optax.GradientTransformation:
        first, second = self.betas
        return optax.scale_by_adam(b1=first, b2=second, eps=self.eps, mu_dtype=jnp.float32)
