# SPDX-License-Identifier: Apache-2.0
"""Every backbone that is registered and has goldens of transformers, against them.

And the small Qwen2-VL that learns mini-MMEB, against transformers itself.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.parity_parts.tools import Largest, Row


def backbones() -> Iterator[Row]:
    """Encodings, merged inputs, layers and packed embeddings of both tiny checkpoints of each."""
    import test_backbones_parity as suite

    for name, variant in suite.CHECKPOINTS:
        golden = suite.Checkpoint(name, variant)
        where, largest = f"{name}/{variant}", Largest()
        rule = "mrope" if "mrope" in golden.rules else golden.rules[0]
        wrong = 0
        for case, item in zip(golden.cases, golden.encoded(rule), strict=True):
            text = item.feature_index < 0
            same = len(item) == case["length"] and (item.tokens[text] == case["ids"][text]).all()
            wrong += not same
        yield Row("tokens", where, wrong, 0, f"inputs of {len(golden.cases)} that differ")
        for at in golden.rules:
            for case, embedded, inputs, states in suite.results(golden, at):
                wanted = golden.arrays[f"{case['name']}/embedding/{at}"]
                largest.see(f"embeddings {at}", embedded, wanted)
                if at != rule:
                    continue
                kept = np.array(case.get("inputs_kept", list(range(case["length"]))))
                largest.see("inputs", inputs[kept], golden.arrays[f"{case['name']}/inputs_embeds"])
                for layer, state in enumerate(states):
                    wanted = golden.arrays[f"{case['name']}/layer_{layer}"]
                    largest.see("layers", state[np.array(case["tokens_kept"])], wanted)
        yield Row("input embeddings with features", where, largest["inputs"], 2e-5)
        yield Row("states after each decoder layer", where, largest["layers"], 1e-4)
        for rule in golden.rules:
            about = f"packed in 3 rows; positions {rule}"
            yield Row("embeddings", where, largest[f"embeddings {rule}"], 1e-5, about)


def mini_qwen2_vl() -> Iterator[Row]:
    """Embeddings by the model and in transformers, both from one folder; needs torch."""
    import test_backbones_torch as suite
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        largest, count = suite.small_qwen2_vl(Path(folder))
    about = f"{count} inputs, against transformers {transformers.__version__} as it runs"
    yield Row("embeddings", "none: models/qwen2_vl/mini.py", largest, 1e-5, about)
