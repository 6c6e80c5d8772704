# SPDX-License-Identifier: Apache-2.0
"""A learned temperature: one number, trained beside the model by an Adam of its own.

Its logarithm is what is trained, as in CLIP. It has a learning rate of its own (Adam moves it by
about that much per update, and the model's 2e-5 would move nothing) with the shape of the run's
schedule, and stays out of the model's gradient norm and its clipping.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Temperature(NamedTuple):
    """The state of a learned temperature, f32 scalars.

    Attributes:
      log: natural logarithm of the temperature.
      mu: first moment of its gradient.
      nu: second moment.
    """

    log: Any
    mu: Any
    nu: Any

    @classmethod
    def start(cls, value: float) -> Temperature:
        """A temperature that has not been trained."""
        # Numbers of the host, so that each becomes a buffer of its own: a step donates them.
        return cls(np.log(np.float32(value)), np.float32(0.0), np.float32(0.0))

    @property
    def value(self) -> jax.Array:
        """What similarities are divided by."""
        return jnp.exp(self.log)


@dataclasses.dataclass(frozen=True)
class TemperatureRule:
    """How it is trained (hashable).

    Attributes:
      lr: learning rate of the logarithm, as a multiple of the model's.
      least: the temperature never falls below this,
      most: nor rises above this.
      betas: decay of the two moments.
      eps: added to the root of the second moment.
    """

    lr: float
    least: float
    most: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def update(self, grad: jax.Array, state: Temperature, lr: jax.Array, step: Any) -> Temperature:
        """One update of Adam.

        Args:
          grad: f32 [], of the loss for the logarithm.
          state: before the update.
          lr: the model's learning rate in this update.
          step: updates made so far, i32 [].
        """
        first, second = self.betas
        count = jnp.asarray(step, jnp.float32) + 1
        mu = first * state.mu + (1 - first) * grad
        nu = second * state.nu + (1 - second) * grad * grad
        ahead = mu / (1 - first**count)
        size = jnp.sqrt(nu / (1 - second**count)) + self.eps
        log = state.log - self.lr * lr * ahead / size
        return Temperature(jnp.clip(log, jnp.log(self.least), jnp.log(self.most)), mu, nu)
