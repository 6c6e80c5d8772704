# SPDX-License-Identifier: Apache-2.0
"""What the Embedder offers beside `encode`: prompts, streams, devices, workers, fewer bits."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from small_models import label, picture, write_model, write_train

from vlm2vec_jax.embedder import Embedder
from vlm2vec_jax.embedding import vectors
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.inputs import BadInputs

pytestmark = pytest.mark.usefixtures("compiled_quickly")

TOLERANCE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("use")
    write_train(root / "data", count=12)
    write_model(root / "data", root / "base")
    for k in range(6):
        picture(k).save(root / f"{k}.png")
    return root


@pytest.fixture(scope="module")
def model(folder) -> Embedder:
    return Embedder.from_pretrained(folder / "base", dtype="float32")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [label(k) for k in range(20)]


@pytest.fixture(scope="module")
def plain(model, texts) -> np.ndarray:
    return model.encode(texts)


def test_prompts_stand_in_front(model, texts, plain):
    model.prompts = {"query": "red ", "passage": "blue "}
    try:
        query, target = model.encode_query(texts), model.encode_target(texts)
        np.testing.assert_allclose(query, model.encode([f"red {t}" for t in texts]), **TOLERANCE)
        np.testing.assert_allclose(target, model.encode([f"blue {t}" for t in texts]), **TOLERANCE)
        assert np.abs(query - target).max() > 1e-3
        np.testing.assert_array_equal(model.encode_document(texts), target)
        np.testing.assert_array_equal(model.encode_query(texts, prompt="blue "), target)
        np.testing.assert_array_equal(model.encode(texts, prompt_name="passage"), target)
        np.testing.assert_allclose(model.encode(texts), plain, **TOLERANCE)
        model.default_prompt_name = "query"
        np.testing.assert_array_equal(model.encode(texts), query)
        np.testing.assert_allclose(model.encode(texts, prompt=""), plain, **TOLERANCE)
    finally:
        model.prompts = {}
    np.testing.assert_allclose(model.encode_query(texts), plain, **TOLERANCE)
    with pytest.raises(UserError, match="no prompt called 'passage'"):
        model.encode(texts, prompt_name="passage")


def test_prompts_are_those_stored_with_the_model(folder, tmp_path):
    import shutil

    copy = shutil.copytree(folder / "base", tmp_path / "base")
    (copy / "config_sentence_transformers.json").write_text('{"prompts": {"query": "red "}}')
    assert Embedder.from_pretrained(copy).prompts == {"query": "red "}
    assert Embedder.from_pretrained(copy, prompts={"a": "b"}).prompts == {"a": "b"}


def test_shorter_vectors_and_fewer_bits(model, texts, plain):
    short = model.encode(texts, truncate_dim=12)
    np.testing.assert_allclose(short, vectors.normalize(plain[:, :12]), **TOLERANCE)
    raw = model.encode(texts, truncate_dim=12, normalize_embeddings=False)
    np.testing.assert_allclose(raw, plain[:, :12], **TOLERANCE)
    with model.truncate_embeddings(12):
        np.testing.assert_array_equal(model.encode(texts), short)
        streamed = np.stack(list(model.encode_stream(texts)))
    np.testing.assert_allclose(streamed, short, **TOLERANCE)
    for precision in ("int8", "uint8", "binary", "ubinary"):
        found = model.encode(texts, precision=precision)
        np.testing.assert_array_equal(found, model.encode(texts, quantize=precision))
        assert found.shape == (20, 32 if "int" in precision else 4)
    bits = model.encode(texts, quantize="ubinary")
    np.testing.assert_array_equal(bits, np.packbits(plain > 0, axis=1))
    few = model.encode(texts[:1], quantize="int8", calibration_embeddings=plain)
    np.testing.assert_array_equal(few, model.encode(texts, quantize="int8")[:1])
    with pytest.raises(UserError, match="precision"):
        model.encode(texts, precision="float16")
    with pytest.raises(UserError, match="truncate_dim"):
        model.encode(texts, truncate_dim=33)


def test_batch_size_is_a_way_to_say_tokens(model, texts, plain):
    counts: list[int] = []
    found = model.encode(texts, batch_size=4, progress=counts.append)
    np.testing.assert_allclose(found, plain, **TOLERANCE)
    assert len(counts) > 1 and sum(counts) == 20
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(UserError, match="batch_size"):
            model.encode(texts, batch_size=wrong)


def test_a_stream_gives_the_same_in_order(folder, model):
    items = [label(k) if k % 3 else folder / f"{k % 6}.png" for k in range(40)]
    wanted = model.encode(items)
    for window in (1, 7, 100):
        found = np.stack(list(model.encode_stream(iter(items), window=window)))
        np.testing.assert_allclose(found, wanted, **TOLERANCE)
    assert list(model.encode_stream([])) == []
    for wrong in (lambda: model.encode_stream(items, window=0), lambda: model.encode_stream("a")):
        with pytest.raises(UserError):
            list(wrong())


def test_a_stream_reads_no_further_than_it_must(model):
    taken = 0

    def endless():
        nonlocal taken
        for k in itertools.count():
            taken += 1
            yield label(k % 36)

    stream = model.encode_stream(endless(), window=10)
    for _ in range(35):
        assert next(stream).shape == (32,)
    stream.close()
    assert taken <= 35 + 3 * 10


def test_bad_inputs_of_a_stream_keep_their_numbers(folder, model):
    torn = folder / "torn.png"
    torn.write_bytes((folder / "1.png").read_bytes()[:-60])
    items = ["a", "b", "c", "d", "e", torn, "f", torn, "g", 3]
    found = []
    with pytest.raises(BadInputs) as error:
        for one in model.encode_stream(items, window=4):
            found.append(one)
    assert len(found) == 4 and list(error.value.problems) == [5, 7]
    assert "input 7: " in str(error.value)
    # By windows it goes on behind the bad ones.
    results = list(model.encode_windows([items[:4], items[4:8], [], items[8:9], items[8:]]))
    kinds = [len(r) if isinstance(r, np.ndarray) else sorted(r.problems) for r in results]
    assert kinds == [4, [1, 3], 0, 1, [1]]
    np.testing.assert_allclose(results[0], np.stack(found), **TOLERANCE)


def test_devices(folder, texts, plain):
    made = Embedder.from_pretrained(folder / "base", dtype="float32", devices=2)
    np.testing.assert_allclose(made.encode(texts), plain, **TOLERANCE)
    last = jax.devices()[-1:]
    made = Embedder.from_pretrained(folder / "base", dtype="float32", devices=last)
    np.testing.assert_allclose(made.encode(texts), plain, **TOLERANCE)
    assert {d for leaf in jax.tree.leaves(made._state) for d in leaf.devices()} == set(last)
    for wrong in (0, 9, True, "two", []):
        with pytest.raises(UserError, match="devices"):
            Embedder.from_pretrained(folder / "base", devices=wrong)


def test_workers_decode_the_same_and_end(folder, model):
    items = [folder / f"{k}.png" for k in range(6)] + ["a text", {"image": picture(1)}]
    items[3] = {"text": "<|image_1|> and <|image_2|>", "images": [folder / "1.png", items[2]]}
    with Embedder.from_pretrained(folder / "base", dtype="float32", workers=2) as made:
        found = made.encode(items)
        np.testing.assert_allclose(found, model.encode(items), **TOLERANCE)
        pids = pool_of(made)
        assert len(pids) >= 1 and all(alive(pid) for pid in pids)
        torn = folder / "torn2.png"
        torn.write_bytes((folder / "1.png").read_bytes()[:-60])
        with pytest.raises(BadInputs, match="input 1: .*torn2.png: truncated"):
            made.encode(["a", torn])
    wait_until(lambda: not any(alive(pid) for pid in pids))
    with pytest.raises(UserError, match="workers"):
        Embedder.from_pretrained(folder / "base", workers=-1)


def test_a_worker_that_dies_is_reported(folder):
    with Embedder.from_pretrained(folder / "base", dtype="float32", workers=1) as made:
        made.encode([folder / "1.png"])
        (pid,) = pool_of(made)
        many = [folder / f"{k % 6}.png" for k in range(600)]
        killer = threading.Timer(0.05, os.kill, (pid, signal.SIGKILL))
        killer.start()
        with pytest.raises(UserError, match="process.* has died"):
            for _ in range(50):
                made.encode(many, batch_tokens=1)
        killer.join()
        assert made.encode([folder / "1.png"]).shape == (1, 32)  # new ones are started


def pool_of(embedder: Embedder) -> list[int]:
    return list(embedder._workers._pool._processes)  # type: ignore[union-attr]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


ORPHANS = """
import sys, time
from vlm2vec_jax.embedding.decoding import Workers
from vlm2vec_jax.inputs import MultimodalInput
from vlm2vec_jax.models.phi3v.processor import Phi3VProcessor
from vlm2vec_jax.models.tokenizer import load_tokenizer

if __name__ == "__main__":
    folder = sys.argv[1]
    tokenizer = load_tokenizer(folder + "/base", tokenizer_class="LlamaTokenizerFast")
    workers = Workers(Phi3VProcessor(tokenizer, crop_size=56), 1)
    workers.take(workers.submit(MultimodalInput(images=(folder + "/1.png",))))
    print(*workers._pool._processes, "jax" in sys.modules, flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed(folder, tmp_path, repository):
    script = tmp_path / "orphans.py"
    script.write_text(ORPHANS)
    env = {**os.environ, "PYTHONPATH": str(repository)}
    argv = [sys.executable, str(script), str(folder)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=env) as process:
        pid, loaded = process.stdout.readline().split()  # type: ignore[union-attr]
        assert loaded == "False"
        assert alive(int(pid))
        process.kill()
    wait_until(lambda: not alive(int(pid)))
