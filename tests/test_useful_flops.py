# SPDX-License-Identifier: Apache-2.0
"""Useful FLOPs of a batch: images of a sequence do not see each other; in one process or two."""

import functools
import json
import threading

import numpy as np
import pytest
from PIL import Image
from test_data_sharing import Meeting

from vlm2vec_jax.data.mixture import Mixture
from vlm2vec_jax.data.mmeb import open_train
from vlm2vec_jax.data.pipeline import Sharing, batches
from vlm2vec_jax.inputs import MultimodalInput
from vlm2vec_jax.models.loading import abstract_model
from vlm2vec_jax.training.batching import BatchPacker, choose_rows

PAIRS = 4


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Own pairs; their queries show no, one, two and three images."""
    root = tmp_path_factory.mktemp("several")
    for n in range(3):
        Image.new("RGB", (64 + 28 * n, 56), (9, 9 * n, 99)).save(root / f"{n}.png")
    lines = [
        {"query": {"text": f"which {k}", "images": [f"{n}.png" for n in range(k)]},
         "positive": {"images": ["1.png"]}}
        for k in range(PAIRS)
    ]  # fmt: skip
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return Mixture(open_train(root / "pairs.jsonl"), 0)


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl"])
def family(goldens, request):
    """Model (of shapes), processor."""
    folder = goldens / request.param / "tied"
    model = abstract_model(folder)
    return model, model.backbone.processor(folder, model.config)


def by_hand(mixture, model, processor):
    """FLOPs of all inputs, each image of its own, and with those of a sequence taken for one."""
    apart = together = 0.0
    for place in range(PAIRS):
        row = mixture.sources[0][place]
        for item in (row.query, row.positive):
            tokens, units = processor.length(item)
            images = [processor.length(MultimodalInput("", (i,)))[1] for i in item.images]
            assert sum(images) == units
            apart += model.backbone.flops(model.config, tokens, images)
            together += model.backbone.flops(model.config, tokens, units)
    return apart, together


@pytest.mark.parametrize("processes", [1, 2])
def test_images_of_a_sequence_are_counted_one_by_one(mixture, family, processes):
    model, processor = family
    rows = [mixture.sources[0][i] for i in range(PAIRS)]
    sizes = [processor.length(item) for row in rows for item in (row.query, row.positive)]
    meeting, found = Meeting(processes), [None] * processes

    def run(process):
        packer = BatchPacker(
            choose_rows(sizes, longest=2048),
            processor.visual_layout,
            chunk_tokens=64 * processes,
            row_multiple=processes,
            part=(process, processes),
            flops=functools.partial(model.backbone.flops, model.config),
        )
        sharing = Sharing(
            process, processes, lambda *args: meeting.exchange(process, *args),
            processor.length, packer,
        )  # fmt: skip
        with batches(mixture, PAIRS, encode=processor.encode, pack=packer, workers=0,
                     sharing=sharing if processes > 1 else None) as stream:  # fmt: skip
            found[process] = next(stream)[1].flops

    threads = [threading.Thread(target=run, args=(p,)) for p in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    apart, together = by_hand(mixture, model, processor)
    assert apart < together
    np.testing.assert_allclose(found, apart, rtol=1e-12)
