# SPDX-License-Identifier: Apache-2.0
"""The train step and what stands around it: optimizer, checkpoints, metrics."""
