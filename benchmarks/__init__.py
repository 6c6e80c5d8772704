# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of vlm2vec_jax; each module is a program that prints a table and writes JSON."""
