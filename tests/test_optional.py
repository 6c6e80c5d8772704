# SPDX-License-Identifier: Apache-2.0
"""Optional packages: a Ray cluster of two nodes that loses a worker, LanceDB tables, FAISS.

make test-optional
"""

import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from small_models import label, write_model, write_train

from vlm2vec_jax import embed, flags, search
from vlm2vec_jax.embedder import Embedder
from vlm2vec_jax.embedding import corpus, index

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("compiled_quickly")]

TOLERANCE = {"rtol": 0, "atol": 1e-5}
ROWS = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("optional")
    write_model(write_train(root / "data"), root / "base")
    lines = [{"text": label(k), "id": f"t{k}"} for k in range(ROWS)]
    (root / "i.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


@pytest.fixture(scope="module")
def wanted(folder) -> np.ndarray:
    model = Embedder.from_pretrained(folder / "base", dtype="float32")
    return model.encode([label(k) for k in range(ROWS)])


@pytest.fixture
def small_windows(monkeypatch) -> None:
    monkeypatch.setattr(corpus, "WINDOW", 4)


def run(module, *argv) -> int:
    return flags.call(module.main, module.define, [module.__name__, *map(str, argv)])


def embed_argv(folder: Path, output: Path, *more) -> list:
    return ["--model", folder / "base", "--input", folder / "i.jsonl", "--output", output,
            "--dtype", "float32", *more]  # fmt: skip


@pytest.fixture(scope="module")
def cluster(repository):
    """Two nodes on this machine, which see the package and the tests."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    paths = [str(repository), str(Path(__file__).parent)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.setenv("XLA_FLAGS", "")
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        store = {"object_store_memory": 100 * 2**20}
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, **store})
        made.add_node(num_cpus=2, **store)
        made.wait_for_nodes()
        try:
            yield made
        finally:
            ray.shutdown()
            made.shutdown()


def workers() -> list[int]:
    """Processes in which an actor of ours lives."""
    found = []
    for place in Path("/proc").iterdir():
        try:
            title = (place / "cmdline").read_bytes() if place.name.isdigit() else b""
        except OSError:
            continue
        if title.startswith(b"ray::") and b"_Actor" in title:
            found.append(int(place.name))
    return found


def test_a_cluster_that_loses_a_worker_loses_nothing(
    cluster, folder, wanted, small_windows, tmp_path
):
    output = tmp_path / "o.npz"
    parts = tmp_path / ".o.npz.parts"
    killed: list[int] = []

    def kill() -> None:
        until = time.monotonic() + 400
        while time.monotonic() < until and not killed:
            done = len(list(parts.glob("*.npz")))
            if 3 <= done < ROWS // 8 and (there := workers()):
                os.kill(there[0], signal.SIGKILL)
                killed.append(there[0])
            time.sleep(0.002)

    killer = threading.Thread(target=kill)
    killer.start()
    argv = embed_argv(folder, output, "--engine", "ray", "--ray_actors", 2, "--ray_address",
                      cluster.address, "--batch_tokens", 32)  # fmt: skip
    code = run(embed, *argv)
    killer.join()
    assert code == 0 and killed
    with np.load(output) as found:
        np.testing.assert_allclose(found["embeddings"], wanted, **TOLERANCE)
    assert not parts.exists()
    import ray

    assert len([node for node in ray.nodes() if node["Alive"]]) == 2
    made_with = index.open_index(output).meta
    assert made_with["count"] == ROWS and made_with["fingerprint"]["dtype"] == "float32"


def test_a_cluster_tells_a_user_s_mistakes(cluster, folder, tmp_path, capfd):
    argv = ["--engine", "ray", "--ray_address", cluster.address]
    wrong = embed_argv(tmp_path, tmp_path / "o.npz", *argv)
    wrong[3] = folder / "i.jsonl"
    assert run(embed, *wrong) == 2
    assert "error: there is no model folder" in capfd.readouterr().err
    (tmp_path / "torn.png").write_bytes(
        (folder / "data/images/ImageNet_1K/1.png").read_bytes()[:-60]
    )
    lines = [{"text": "a"}, {"images": ["torn.png"]}]
    (tmp_path / "i.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    wrong = embed_argv(folder, tmp_path / "o.npz", *argv)
    wrong[3] = tmp_path / "i.jsonl"
    assert run(embed, *wrong) == 2
    said = capfd.readouterr().err
    assert "has bad lines (1 problem)" in said and "line 2: " in said and "torn.png" in said


def test_a_lancedb_table(folder, wanted, small_windows, tmp_path, capsys):
    pytest.importorskip("lancedb")
    output = tmp_path / "vectors.lance"
    for _ in range(2):  # a table that is there is replaced
        assert run(embed, *embed_argv(folder, output)) == 0
    stored = index.open_index(output)
    assert len(stored) == ROWS
    found = np.concatenate(list(index.vectors_of(stored)))
    np.testing.assert_allclose(found, wanted, **TOLERANCE)
    rows = stored.rows([7, 3])
    assert [row["id"] for row in rows] == ["t7", "t3"] and rows[0]["text"] == label(7)
    for engine in ("exact", "lancedb"):
        capsys.readouterr()
        query = ["--index", output, "--query", label(9), "--top_k", 3, "--engine", engine, "--json"]
        assert run(search, *query) == 0
        hits = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert hits[0]["text"] == label(9) and len(hits) == 3
        assert hits[0]["score"] == pytest.approx(1, abs=1e-4)
    assert run(embed, *embed_argv(folder, output, "--precision", "ubinary")) == 0
    stored = index.open_index(output)
    packed = np.concatenate(list(stored.stored()))
    assert packed.dtype == np.uint8 and packed.shape == (ROWS, 4)


def test_faiss(folder, tmp_path, capsys):
    pytest.importorskip("faiss")
    output = tmp_path / "o.npz"
    assert run(embed, *embed_argv(folder, output)) == 0
    for factory in (None, "Flat", "IVF4,Flat"):
        more = [] if factory is None else ["--faiss_index", factory]
        for _ in range(2):  # built, then read
            capsys.readouterr()
            query = ["--index", output, "--query", label(9), "--top_k", 3, "--engine", "faiss"]
            assert run(search, *query, "--json", *more) == 0, capsys.readouterr().err
            hits = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
            assert hits[0]["text"] == label(9)
            assert hits[0]["score"] == pytest.approx(1, abs=1e-4)
    assert json.loads((tmp_path / "o.npz.faiss.json").read_text())["factory"] == "IVF4,Flat"
    assert run(search, *query, "--faiss_index", "nonsense") == 2
    assert "FAISS does not know the index 'nonsense'" in capsys.readouterr().err
