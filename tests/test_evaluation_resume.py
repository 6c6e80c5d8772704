# SPDX-License-Identifier: Apache-2.0
"""An evaluation that goes on: interrupted, moved, of another model, over stale or hostile files."""

import os
import shutil

import numpy as np
import pytest
from evaluation_data import FakeEncoder, evaluate, labels, two_subsets, write_image, write_subset

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.evaluation import embedding, scoring, store
from vlm2vec_jax.evaluation.rows import Settings


@pytest.fixture
def data(tmp_path):
    return two_subsets(tmp_path / "data")


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_the_second_run_embeds_nothing_and_changes_nothing(data, tmp_path):
    output = tmp_path / "out"
    first, _ = evaluate(FakeEncoder(), data, output)
    before = files(output)
    encoder = FakeEncoder()
    second, said = evaluate(encoder, data, output)
    assert encoder.seen == [] and second == first and files(output) == before
    assert any("already evaluated" in s for s in said)


def test_an_interrupted_evaluation_goes_on(data, tmp_path):
    output, plain = tmp_path / "out", tmp_path / "plain"
    with pytest.raises(RuntimeError, match="stopped"):
        evaluate(FakeEncoder(fail_at=2), data, output, inputs_at_once=1)
    assert not (output / "scores.json").exists()
    assert (output / "ImageNet-1K_score.json").exists()
    # What a killed process leaves behind: a temporary file, and half of an older version's file.
    (output / ".MSCOCO_t2i_embeddings.npz.abc.tmp").write_bytes(b"PK")
    (output / "MSCOCO_t2i_embeddings.npz").write_bytes(b"PK\x03\x04 half a file")
    encoder = FakeEncoder()
    resumed, said = evaluate(encoder, data, output)
    assert all(not images or "MSCOCO" in images[0] for _, images in encoder.seen)
    assert any("cannot be read; embedded again" in s for s in said)
    once, _ = evaluate(FakeEncoder(), data, plain)
    assert resumed == once
    for name, content in files(plain).items():
        if not name.endswith(".npz"):  # an npz holds the time of day
            assert files(output)[name] == content, name


def test_an_interruption_between_embedding_and_scoring(data, tmp_path, monkeypatch):
    output = tmp_path / "out"

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "judge", stop)
        with pytest.raises(KeyboardInterrupt):
            evaluate(FakeEncoder(), data, output)
    encoder = FakeEncoder()
    evaluate(encoder, data, output, ["ImageNet-1K"])
    assert encoder.seen == []


def test_another_model_never_uses_what_is_there(data, tmp_path):
    output = tmp_path / "out"
    evaluate(FakeEncoder("a"), data, output)
    encoder = FakeEncoder("b")
    found, said = evaluate(encoder, data, output)
    assert any('encoder.model: "a" -> "b"' in s for s in said)
    expected, _ = evaluate(FakeEncoder("b"), data, tmp_path / "fresh")
    assert found == expected
    assert len(encoder.seen) == 6 + 6 + 5 + 7


def test_results_of_two_models_are_not_mixed_in_one_table(data, tmp_path):
    output = tmp_path / "out"
    evaluate(FakeEncoder("a"), data, output)
    found, said = evaluate(
        FakeEncoder("b"), data, output, ["ImageNet-1K"], others=["MSCOCO_t2i"]
    )  # fmt: skip
    assert list(found["subsets"]) == ["ImageNet-1K"]
    assert any("MSCOCO_t2i: not chosen and left out" in s for s in said)


def test_subsets_of_several_runs_of_one_model_make_one_table(data, tmp_path):
    output = tmp_path / "out"
    evaluate(FakeEncoder(), data, output, ["MSCOCO_t2i"])
    found, _ = evaluate(FakeEncoder(), data, output, ["ImageNet-1K"], others=["MSCOCO_t2i"])
    expected, _ = evaluate(FakeEncoder(), data, tmp_path / "fresh")
    assert found == expected


def test_predictions_of_another_model_under_a_good_score_are_noticed(data, tmp_path):
    """A run of b stopped between its predictions and its score; then a runs again."""
    output = tmp_path / "out"
    evaluate(FakeEncoder("a"), data, output)
    path = store.predictions_path(output, "ImageNet-1K")
    good = path.read_bytes()
    path.write_text("{}\n")
    _, said = evaluate(FakeEncoder("a"), data, output)
    assert path.read_bytes() == good
    assert any("predictions are missing or were changed" in s for s in said)


@pytest.mark.parametrize("change", ["image", "candidates", "text"])
def test_changed_data_is_noticed(data, tmp_path, change):
    output = tmp_path / "out"
    evaluate(FakeEncoder(), data, output)
    rows = labels()
    if change == "image":
        write_image(data / "img/ImageNet-1K_2.png", seed=1)
    elif change == "candidates":  # same inputs, other lists: scored again, embedded not at all
        rows[0]["tgt_text"] = rows[0]["tgt_text"][::-1]
        write_subset(data, "ImageNet-1K", rows)
    else:
        rows[3]["tgt_text"][1] = "label 4 "
        write_subset(data, "ImageNet-1K", rows)
    encoder = FakeEncoder()
    found, _ = evaluate(encoder, data, output)
    expected, _ = evaluate(FakeEncoder(), data, tmp_path / "fresh")
    assert found == expected
    assert bool(encoder.seen) == (change != "candidates")
    assert all(i == () or "ImageNet" in i[0] for _, i in encoder.seen)


def test_data_and_results_may_be_moved(data, tmp_path):
    first, _ = evaluate(FakeEncoder(), data, tmp_path / "out")
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.move(data, moved / "mmeb")
    shutil.move(tmp_path / "out", moved / "results")
    encoder = FakeEncoder()
    second, _ = evaluate(encoder, moved / "mmeb", moved / "results")
    assert encoder.seen == [] and second == first


def test_similarity_is_part_of_a_score_not_of_an_embedding(data, tmp_path):
    output = tmp_path / "out"
    evaluate(FakeEncoder(), data, output)
    encoder = FakeEncoder()
    found, _ = evaluate(encoder, data, output, settings=Settings("dot"))
    assert encoder.seen == [] and found["similarity"] == "dot"


def test_a_full_disk_leaves_earlier_results_whole(data, tmp_path, monkeypatch):
    output = tmp_path / "out"
    evaluate(FakeEncoder("a"), data, output)
    before = files(output)

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="No space left"):
        evaluate(FakeEncoder("b"), data, output)
    assert files(output) == before


def test_a_large_subset_is_saved_while_it_is_embedded(data, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "INPUTS_PER_CALL", 5)
    output = tmp_path / "out"
    stopped = FakeEncoder(fail_at=3)
    with pytest.raises(RuntimeError, match="stopped"):
        evaluate(stopped, data, output, inputs_at_once=1)
    encoder = FakeEncoder()
    resumed, said = evaluate(encoder, data, output, inputs_at_once=1)
    assert not set(encoder.seen) & set(stopped.seen) and len(stopped.seen) == 10
    assert any("taken from ImageNet-1K_embeddings.npz" in s for s in said)
    assert resumed == evaluate(FakeEncoder(), data, tmp_path / "plain")[0]


def snapshot(folder, without):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and not p.is_symlink() and without not in p.parents
    }


def test_nothing_is_written_outside_the_output_and_nothing_run(data, tmp_path):
    """Results of somebody else: links that lead away, a pickled file, another model's scores."""
    output, away = tmp_path / "out", tmp_path / "away"
    evaluate(FakeEncoder("other"), data, output)
    away.mkdir()
    for name in ("ImageNet-1K_score.json", "ImageNet-1K_pred.jsonl", "scores.json", "scores.md"):
        (away / name).write_bytes((output / name).read_bytes())
        (output / name).unlink()
        (output / name).symlink_to(away / name)

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    np.savez(output / "MSCOCO_t2i_embeddings.npz", keys=np.array([Evil()], object))
    before = snapshot(tmp_path, output)
    found, said = evaluate(FakeEncoder("ours"), data, output)
    assert found == evaluate(FakeEncoder("ours"), data, tmp_path / "fresh")[0]
    shutil.rmtree(tmp_path / "fresh")
    assert snapshot(tmp_path, output) == before
    assert not (tmp_path / "executed").exists()
    assert any("other" in s and "ours" in s for s in said)
    assert any("MSCOCO_t2i_embeddings.npz cannot be read" in s for s in said)
