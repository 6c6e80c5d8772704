# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL (2B, 8B), the base of Qwen3-VL-Embedding."""
