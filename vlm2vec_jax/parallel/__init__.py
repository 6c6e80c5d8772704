# SPDX-License-Identifier: Apache-2.0
"""Meshes, sharding rules and start-up of several processes. Knows jax and numpy only."""
