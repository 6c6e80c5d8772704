# SPDX-License-Identifier: Apache-2.0
"""Every backbone that is registered and has goldens of transformers, against them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from benchmarks.parity_parts.tools import Largest, Row


def backbones() -> Iterator[Row]:
    """Encodings, merged inputs, layers and packed embeddings of both tiny checkpoints of each."""
    import jax
    import test_backbones_parity as suite

    for name, variant in suite.CHECKPOINTS:
        golden = suite.Checkpoint(name, variant)
        where, module, largest = f"{name}/{variant}", golden.model.module, Largest()
        rule = "mrope" if "mrope" in golden.rules else golden.rules[0]
        wrong = 0
        for case, item in zip(golden.cases, golden.encoded(rule), strict=True):
            text = item.feature_index < 0
            same = len(item) == case["length"] and (item.tokens[text] == case["ids"][text]).all()
            wrong += not same
        yield Row("tokens", where, wrong, 0, f"inputs of {len(golden.cases)} that differ")
        batch = golden.batch(rule, [[i] for i in range(len(golden.cases))], pad=0)
        found = jax.jit(lambda m, b: m.input_embeddings(b, suite.EXACT))(module, batch)
        x = found[0] if isinstance(found, tuple) else found
        states = suite.layers(module, batch, found)
        for number, case in enumerate(golden.cases):
            kept = np.array(case.get("inputs_kept", list(range(case["length"]))))
            wanted = golden.arrays[f"{case['name']}/inputs_embeds"]
            largest.see("inputs", np.asarray(x[number])[kept], wanted)
            tokens = np.array(case["tokens_kept"])
            for layer, state in enumerate(states):
                wanted = golden.arrays[f"{case['name']}/layer_{layer}"]
                largest.see("layers", np.asarray(state[number])[tokens], wanted)
        yield Row("input embeddings with features", where, largest["inputs"], 2e-5)
        yield Row("states after each decoder layer", where, largest["layers"], 1e-4)
        count = len(golden.cases)
        rows = [list(range(count))[k::3] for k in range(3)]
        for rule in golden.rules:
            embedded = suite.embeddings(module, golden.batch(rule, rows))
            for number, case in enumerate(golden.cases):
                wanted = golden.arrays[f"{case['name']}/embedding/{rule}"]
                largest.see(f"embeddings {rule}", embedded[number], wanted)
            about = f"packed in 3 rows; positions {rule}"
            yield Row("embeddings", where, largest[f"embeddings {rule}"], 1e-5, about)
