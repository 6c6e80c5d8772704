# SPDX-License-Identifier: Apache-2.0
"""Content hashes become the small numbers that the loss compares; warnings about batches."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vlm2vec_jax.config import Config, LossConfig
from vlm2vec_jax.inputs import EncodedInput, content_hash
from vlm2vec_jax.training.identities import identities
from vlm2vec_jax.training.watch import LossWatch

HASHES = st.integers(0, 4).map(lambda n: n * 10**17 + 1)


@given(
    rows=st.lists(st.tuples(HASHES, HASHES, st.lists(HASHES, max_size=4)), min_size=1, max_size=12),
    negatives=st.integers(0, 3),
)
def test_numbers_are_equal_where_contents_are(rows, negatives):
    targets, queries = (np.array(column, np.int64) for column in list(zip(*rows))[:2])
    hard = [row[2] for row in rows]
    found = identities(targets, queries, hard, negatives=negatives, same_query=True)
    columns = [[t, *h[:negatives], *[None] * (negatives - len(h))] for t, _, h in rows]
    flat = [content for row in columns for content in row]
    assert found.valid.tolist() == [content is not None for content in flat]
    for a, number in zip(flat, found.target_id.tolist(), strict=True):
        assert (number == -1) == (a is None)
        for b, other in zip(flat, found.target_id.tolist(), strict=True):
            assert (a == b) == (number == other)
    number = dict(zip(flat, found.target_id.tolist(), strict=True))
    width = found.known.shape[1]
    assert width & (width - 1) == 0
    for i, (target, query, _) in enumerate(rows):
        right = {number[t] for t, q, _ in rows if q == query}
        assert found.known[i, 0] == number[target]
        assert set(found.known[i].tolist()) - {-1} == right
    alone = identities(targets, queries, hard, negatives=negatives)
    assert alone.known.tolist() == found.known[:, :1].tolist()


def test_a_content_hash_is_of_text_and_pixels():
    def item(tokens, pixels=None):
        tokens = np.array(tokens, np.int32)
        visual = {} if pixels is None else {"crops": np.full((1, 2, 2, 3), pixels, np.uint8)}
        return EncodedInput(tokens, np.full(len(tokens), -1, np.int32), tokens, visual)

    things = [item([1, 2]), item([1]), item([1, 2], 7), item([1, 2], 8), item([])]
    ids = [content_hash(thing) for thing in things]
    assert len(set(ids)) == len(ids) and all(0 <= i < 2**63 for i in ids)
    assert content_hash(item([1, 2], 7)) == ids[2]


def test_warnings_come_once_and_not_for_a_single_bad_batch():
    watch = LossWatch(Config(batch_size=8))
    full = {"duplicate_targets": 0.5, "accuracy": 0.2}
    told = [watch.look(step, full | ({"duplicate_targets": 0} if step == 5 else {}))
            for step in range(1, 40)]  # fmt: skip
    spoken = [(step, lines) for step, lines in enumerate(told, 1) if lines]
    assert [step for step, _ in spoken] == [15]
    assert "50%" in spoken[0][1][0] and "mask_duplicate_targets" in spoken[0][1][0]
    masked = LossWatch(Config(loss=LossConfig(mask_duplicate_targets=True)))
    (line,) = [line for step in range(1, 20) for line in masked.look(step, full)]
    assert "fewer" in line
    easy = [line for step in range(1, 20) for line in watch.look(step, {"accuracy": 1.0})]
    assert len(easy) == 1 and "batches of 8 are too small" in easy[0]
