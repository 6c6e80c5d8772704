# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL (3B, 7B): window attention and a gated MLP in the vision tower."""
