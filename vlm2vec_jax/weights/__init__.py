# SPDX-License-Identifier: Apache-2.0
"""Weights in and out: name tables, safetensors, loading, PEFT adapters, export.

Everything here works on flat dicts, path -> array, and is handed the table of a backbone; it
knows neither the models nor flax.

* `rules`: the name table (HF tensor <-> leaf), one for both directions.
* `safetensors`: checkpoints on disk, read by slices, written in shards.
* `load`: a checkpoint into (sharded) device arrays.
* `adapter_config`, `targets`, `adapters`: PEFT adapters: settings, targets, tensors, merging.
* `export`: folders that the Hugging Face world loads.
"""
