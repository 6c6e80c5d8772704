# SPDX-License-Identifier: Apache-2.0
"""Targets that come more than once, and rows that give their answer away.

None of this stops a run: a classification has only so many labels. But a candidate list with the
truth in it twice cannot be answered, a query that is its own positive teaches nothing, and a
negative that is the positive teaches the opposite.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vlm2vec_jax.data.checks import Finding
from vlm2vec_jax.data.folders import EVAL_COLUMNS, NEGATIVE_COLUMNS, TRAIN_COLUMNS
from vlm2vec_jax.data.mmeb import EvalSource, TrainSource, number_keys

TRUTH_TWICE = "the truth stands in its candidate list again"
CANDIDATE_TWICE = "a candidate stands in its list again"
OWN_TARGET = "query and positive are the same"
PAIR_TWICE = "the same pair as an earlier row"
FALSE_NEGATIVE = "a negative is the row's own positive"


def eval_duplicates(source: EvalSource) -> tuple[list[Finding], int]:
    """Findings in evaluation rows whose lists are sound, and the number of distinct targets."""
    index = source.unique_keys()
    counts = np.diff(index.offsets)
    row_of = np.repeat(np.arange(len(counts)), counts)
    truth = index.target_of[index.offsets[:-1]] if len(counts) else np.zeros(0, np.int64)
    again = np.bincount(row_of[index.target_of == truth[row_of]], minlength=len(counts)) - 1
    # Numbering (row, target) pairs tells how many different candidates each row has.
    pairs = np.unique(row_of * max(1, len(index.targets)) + index.target_of)
    distinct = np.bincount(pairs // max(1, len(index.targets)), minlength=len(counts))
    found = []
    for i in np.flatnonzero(again > 0):
        message = f"{TRUTH_TWICE}: {index.targets[truth[i]][0]!r:.60}"
        found.append(Finding(int(source.rows[i]), EVAL_COLUMNS[2], TRUTH_TWICE, message))
    for i in np.flatnonzero(counts - distinct - again > 0):
        extra = int(counts[i] - distinct[i] - again[i])
        message = f"{extra} of {counts[i]} candidates stand in the list before"
        found.append(Finding(int(source.rows[i]), EVAL_COLUMNS[2], CANDIDATE_TWICE, message))
    return found, len(index.targets)


def train_duplicates(source: TrainSource) -> tuple[list[Finding], int]:
    """Findings in training rows, and the number of distinct targets."""
    keys: dict = {}
    queries, targets, found = [], [], []
    for rows, batch in source.table.scan(source.rows):
        query, positive = (
            number_keys(batch.column(text), batch.column(path), keys)
            for text, path in (TRAIN_COLUMNS[:2], TRAIN_COLUMNS[2:])
        )
        queries.append(query)
        targets.append(positive)
        if set(NEGATIVE_COLUMNS) & set(batch.schema.names):
            found += _false_negatives(source, rows)
    none = [np.zeros(0, np.int64)]
    query, target = np.concatenate(none + queries), np.concatenate(none + targets)
    for i in np.flatnonzero(query == target):
        found.append(Finding(int(source.rows[i]), TRAIN_COLUMNS[2], OWN_TARGET, OWN_TARGET))
    pair = query * max(1, len(keys)) + target
    _, first, inverse = np.unique(pair, return_index=True, return_inverse=True)
    earlier = first[inverse.reshape(-1)]
    for i in np.flatnonzero(earlier != np.arange(len(pair))):
        message = f"the same pair as row {int(source.rows[earlier[i]])}"
        found.append(Finding(int(source.rows[i]), TRAIN_COLUMNS[0], PAIR_TWICE, message))
    return found, len(np.unique(target))


def _false_negatives(source: TrainSource, rows: np.ndarray) -> Iterator[Finding]:
    for row, values in zip(rows.tolist(), source.table.take(rows), strict=True):
        positive, negatives = source.keys(row, values)[1:]
        if positive in negatives:
            yield Finding(row, NEGATIVE_COLUMNS[0], FALSE_NEGATIVE, FALSE_NEGATIVE)
