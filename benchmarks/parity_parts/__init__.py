# SPDX-License-Identifier: Apache-2.0
"""The measurements behind `benchmarks.parity`, by what they compare."""
