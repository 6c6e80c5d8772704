# SPDX-License-Identifier: Apache-2.0
"""Parts that several backbones are made of; the only code of `models` that they have in common."""
