# SPDX-License-Identifier: Apache-2.0
"""What stands around a model that embeds: prompts, batches, decoding, corpora, stores, search.

`vlm2vec_jax.Embedder` and the commands `embed` and `search` are made of these. All but `loading`
stand on the host side: what computes is handed in, so they load no jax by themselves.
"""
