# SPDX-License-Identifier: Apache-2.0
"""Phi-3.5-Vision (`model_type: phi3_v`): CLIP tower, HD transform, projector, Phi-3 decoder."""
