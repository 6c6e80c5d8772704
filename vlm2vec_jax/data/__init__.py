# SPDX-License-Identifier: Apache-2.0
"""Data on disk and on its way to the packer: readers, mixture, pipeline, mini-MMEB. No jax here."""
