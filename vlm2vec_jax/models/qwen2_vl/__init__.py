# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL (2B, 7B), the base of VLM2Vec-Qwen2VL and VLM2Vec-V2.0."""
