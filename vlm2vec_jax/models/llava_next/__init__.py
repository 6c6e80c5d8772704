# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT (`model_type: llava_next`): CLIP tiles of any resolution and a Mistral decoder."""
