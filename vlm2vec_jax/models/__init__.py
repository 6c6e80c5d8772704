# SPDX-License-Identifier: Apache-2.0
"""Backbones, one folder each; `registry.py` finds them by HF's `model_type`."""
