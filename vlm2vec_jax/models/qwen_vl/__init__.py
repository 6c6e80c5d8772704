# SPDX-License-Identifier: Apache-2.0
"""Parts that Qwen2-VL, Qwen2.5-VL and Qwen3-VL share; no backbone of its own.

Axis legend: R rows, T tokens, S sequences of a row, D text width, V vocabulary, C visual units of
a row (merged patches, one feature each), P = C m^2 patches, m patches along a side of a unit, W
width of the vision tower.
"""
