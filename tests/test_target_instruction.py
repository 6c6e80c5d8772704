# SPDX-License-Identifier: Apache-2.0
"""The instruction on targets: which targets get it, in training and in evaluation alike."""

from pathlib import Path

import pytest
from data_files import make_train

from vlm2vec_jax.data.mmeb import TrainSource
from vlm2vec_jax.data.target_instruction import WORDS, instructed, words_of


def test_texts_alone_get_the_words_of_their_task():
    assert words_of("task", "VOC2007") == WORDS["classification"]
    assert words_of("task", "ImageNet_1K") == WORDS["classification"]
    assert words_of("task", "ScienceQA") == WORDS["vqa"]
    assert words_of("task", "MSCOCO_i2t") == WORDS["retrieval"]
    assert words_of("task", "my own") == WORDS["other"]
    label = instructed("task", "VOC2007", "cat", "")
    assert label == "Represent the following answer to an image classification task: cat"
    assert instructed("Say:", "x", "cat\n", "") == "Say: cat\n"
    assert instructed("task", "x", "<|image_1|> Represent it.", "a.png").startswith("<|image_1|>")
    assert instructed("task", "x", " ", "") == " " and instructed("", "x", "cat", "") == "cat"


@pytest.mark.parametrize("rule", ["", "task"])
def test_a_training_row_has_it_on_its_targets_only(tmp_path, rule):
    make_train(tmp_path, {"VOC2007": 6})
    source = TrainSource(tmp_path, "VOC2007")
    bare = source[0]
    source.target_instruction = rule
    row = source[0]
    assert row.query == bare.query and row.positive_key == bare.positive_key
    assert row.positive.text == source.as_target(bare.positive_key)[0]
    assert (row.positive.text != bare.positive.text) == (bool(rule) and not bare.positive.images)
    assert isinstance(source.data, Path)
