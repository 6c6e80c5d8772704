# SPDX-License-Identifier: Apache-2.0
"""An image is decoded once a step: shown by several pairs, on both sides, and with GradCache."""

import threading
from collections import Counter

import pytest
from data_files import train_rows, write_image, write_parquet
from test_data_pipeline import encode, first, pack
from test_data_sharing import assert_same, together, whole
from test_train_command import run
from training_tools import mini_model

from vlm2vec_jax import images
from vlm2vec_jax.data.mixture import Mixture
from vlm2vec_jax.data.mmeb import open_train
from vlm2vec_jax.data.pipeline import batches
from vlm2vec_jax.data.step_rows import StepRows
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.inputs import MultimodalInput

PAIRS = 24


@pytest.fixture
def decoded(monkeypatch):
    """How often each file has been decoded so far."""
    counts, lock, real = Counter(), threading.Lock(), images._decode

    def counted(image, name, *args):
        with lock:
            counts[name] += 1
        return real(image, name, *args)

    monkeypatch.setattr(images, "_decode", counted)
    return counts


def write(root, size=(8, 6)):
    """Pairs with four pictures among their queries, the same and another among their targets."""
    rows = train_rows("A", PAIRS, images=PAIRS)
    for i, row in enumerate(rows):
        row["qry_image_path"] = f"images/{i % 4}.png"
        row["neg_text"], row["neg_image_path"] = ["<|image_1|> no"], ["images/0.png"]
        if i % 3 < 2:
            row["pos_text"] = f"<|image_1|> {i}"
            row["pos_image_path"] = f"images/{(i % 4, 4)[i % 3]}.png"  # the query's own, or a fifth
    write_parquet(root / "A", "original", rows)
    for n in range(5):
        write_image(root / f"images/{n}.png", size, n)
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write(tmp_path_factory.mktemp("repeats"))


def shown(mixture, drawn, negatives):
    """The files that these rows show."""
    rows = [mixture.sources[source][position] for source, position in drawn]
    items = [item for r in rows for item in (r.query, r.positive, *r.negatives[:negatives])]
    return {str(image) for item in items for image in item.images}


@pytest.mark.parametrize("negatives", [0, 1])
def test_each_file_of_a_step_is_decoded_once(root, decoded, negatives):
    mixture = Mixture(open_train(root), 3)
    with batches(mixture, 8, encode=encode, pack=pack, workers=0, negatives=negatives) as stream:
        for step in range(4):
            decoded.clear()
            next(stream)
            files = shown(mixture, mixture.batch_indices(step, 8).tolist(), negatives)
            assert len(files) < 12 and decoded == dict.fromkeys(files, 1)
    assert images.SharedImage._held == 0


@pytest.mark.parametrize("workers", [1, 4])
def test_threads_share_what_one_of_them_has_decoded(root, decoded, workers, monkeypatch):
    mixture, drawn = Mixture(open_train(root), 3), []
    real = mixture.batch_indices
    monkeypatch.setattr(
        mixture, "batch_indices", lambda step, size: drawn.append(step) or real(step, size)
    )
    assert len(first(mixture, PAIRS, 3, workers=workers)) == 3
    assert len(drawn) == len(set(drawn))
    assert set(decoded) == {str(root / f"images/{n}.png") for n in range(5)}
    assert 3 <= min(decoded.values()) and max(decoded.values()) <= len(drawn)


def test_each_process_decodes_what_its_rows_show_once(root, decoded):
    mixture = Mixture(open_train(root), 3)
    parts = together(mixture, 12, 1, 2, workers=0, negatives=1)
    assert max(decoded.values()) <= 2 and len(decoded) == 5
    assert_same(parts, whole(mixture, 12, 1, negatives=1))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_damaged_file_that_several_show(tmp_path, processes):
    write(tmp_path, size=(40, 40))
    path = tmp_path / "images/2.png"
    path.write_bytes(path.read_bytes()[:-30])
    mixture = Mixture(open_train(tmp_path), 3)
    expected = whole(mixture, 12, 2, on_bad_example="skip")
    assert any("2.png" in message for message in expected[0][2].skipped)
    if processes > 1:
        assert_same(together(mixture, 12, 2, 2, workers=2, on_bad_example="skip"), expected)
    else:
        found = first(mixture, 12, 2, workers=4, on_bad_example="skip")
        assert [rows for _, _, rows, *_ in found] == [s.rows.tolist() for *_, s in expected]
        with pytest.raises(UserError, match=r"2\.png.*\n.*2\.png"):  # once for each of its rows
            first(mixture, 12, 1, workers=0)


def test_rows_are_handed_out_once_and_then_forgotten():
    read, item = [], MultimodalInput("a", ())

    def rows(source, position):
        read.append((source, position))
        return [item] if position else None

    step_rows = StepRows(lambda step: [(step, 0), (step, 1)], rows)
    assert step_rows.take(5, 1) == ((5, 1), [item]) and read == [(5, 0), (5, 1)]
    assert step_rows.take(6, 0) == ((6, 0), None)
    assert step_rows.take(5, 0) == ((5, 0), None)
    assert list(step_rows._steps) == [6] and len(read) == 4
    assert StepRows(lambda step: [(step, 1)], None).take(2, 0) == ((2, 1), None)


@pytest.mark.usefixtures("compiled_quickly")
def test_gradcache_and_the_plan_decode_nothing_again(tmp_path, root, repository, decoded):
    """Sizes come from headers, and both passes of each chunk read the arrays that were packed."""
    settings = {
        "model.path": mini_model(tmp_path),
        "model.dtype": "float32",
        "data.path": root,
        "data.subsets": "A",
        "data.num_crops": 1,
        "data.workers": 2,
        "batch_size": PAIRS,
        "steps": 2,
        "optim.warmup_steps": 0,
        "adapter.type": "lora",
        "mesh.data": 1,
        "remat": "none",
        "grad_cache": "on",
        "packing.chunk_tokens": 128,
        "output": tmp_path / "out",
    }
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    assert run("--config", repository / "configs/mmeb.py", *flags) == 0
    # Two steps, and the batches that were made ahead of them.
    assert len(decoded) == 5 and 2 <= min(decoded.values()) and max(decoded.values()) <= 5
