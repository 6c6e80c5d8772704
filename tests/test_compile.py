# SPDX-License-Identifier: Apache-2.0
"""The compile command's words: topologies, refusals, verdicts. (Compiling: test_tpu_compile.)"""

import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
from full_size import FOLDER
from hypothesis import given
from hypothesis import strategies as st

from vlm2vec_jax.compile import read_topology
from vlm2vec_jax.config import AdapterConfig, Config, DataConfig, ModelConfig
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.parallel import mesh
from vlm2vec_jax.training import plan, plan_words
from vlm2vec_jax.training.chunk_search import Trial, largest, search


def test_topologies():
    assert read_topology("v5e:8x8") == ("v5litepod-64", 16 * 2**30)
    assert read_topology("v5p:2x2x4") == ("v5p-32", 95 * 2**30)
    assert read_topology("v6e:4x4") == ("v6e-16", 32 * 2**30)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v4:2x2", "v5e, v5p, v6e"),
        ("v5e", "v5e:AxB"),
        ("v5e:2x2x2", "v5e:AxB"),
        ("v5p:4x4", "AxBxC"),
        ("v5e:0x2", "v5e:AxB"),
        ("v5e:ax2", "v5e:AxB"),
    ],
)
def test_wrong_topologies_are_told_in_words(name, said):
    with pytest.raises(UserError, match=said):
        read_topology(name)


def test_memory_out_of_the_compilers_refusal():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 24.50G of 15.75G hbm. "
        "Exceeded hbm capacity by 8.75G."
    )
    assert plan.memory_refused(message) == int(24.5 * 2**30)
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (15.80G) exceeds available HBM (15.75G)."
    )
    assert plan.memory_refused(message) == int(15.8 * 2**30)
    assert plan.memory_refused("INTERNAL: something else") is None


def test_verdict():
    report = {"peak_bytes_per_chip": 8, "hbm_bytes_per_chip": 16, "fits": True}
    assert plan_words.verdict(report) == "it fits: 50% of a chip's memory"
    report |= {"peak_bytes_per_chip": 24, "fits": False}
    assert "does not fit: 150%" in plan_words.verdict(report) and "mesh.fsdp" in plan_words.verdict(
        report
    )


def test_mistakes_end_with_a_sentence(repository):
    def run(*more):
        command = [
            sys.executable,
            "-m",
            "vlm2vec_jax.compile",
            "--config",
            "configs/mmeb.py",
            *more,
        ]
        return subprocess.run(command, cwd=repository, capture_output=True, text=True)

    done = run("--topology", "tpu9")
    assert done.returncode == 2 and "generation must be one of" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_mesh_that_a_slice_cannot_take_is_told_in_words(monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError("Failed to find assignment for logical_axis_index 1")

    monkeypatch.setattr(mesh.jax, "make_mesh", refuse)
    with pytest.raises(UserError, match="product of whole sides"):
        mesh.make_mesh(2, 4)


def test_the_largest_chunk_is_estimated_on_the_safe_side():
    report = {
        "grad_cache": True, "hbm_bytes_per_chip": 1000, "groups": [{"rows": 8, "tokens": 512}],
        "memory": {"arguments": 150, "temporaries": 200, "results": 0},
    }  # fmt: skip
    assert plan.largest_chunk(report, shards=4) == 4 * 1024
    assert plan.largest_chunk(report | {"grad_cache": False}, shards=4) is None
    full = report | {"memory": {"arguments": 990, "temporaries": 1, "results": 0}}
    assert plan.largest_chunk(full, shards=4) == 0


@given(
    start=st.sampled_from([512, 2048, 4096, 16384]),
    fixed=st.integers(1, 2000),
    slope=st.floats(0.01, 2.0),
    row=st.sampled_from([128, 256, 1536]),
    bend=st.floats(0.0, 0.2),
)
def test_the_largest_chunk_is_compiled_and_fits(start, fixed, slope, row, bend):
    """Memory of a fixed part and one that grows, in steps of whole rows and not quite evenly."""
    limit, most, asked = 10_000, 65_536, []

    def needs(size: int) -> int:
        held = max(size // row, 1) * row
        return int(fixed + slope * held * (1 + bend * held / most))

    def measure(size: int) -> int:
        asked.append(size)
        return needs(size)

    found = search(measure, Trial(start, needs(start)), limit=limit, most=most, step=row)
    assert [t.chunk_tokens for t in found] == [start, *asked] and len(asked) <= 4
    assert len(set(asked)) == len(asked) and all(0 < size <= most for size in asked)
    best = largest(found, limit)
    fits = max((size for size in range(row, most + 1, row) if needs(size) <= limit), default=0)
    if fits == 0:
        assert best is None
    elif fits >= start // 64:
        assert best is not None and needs(best) <= limit
        assert best >= 0.85 * fits - row, (best, fits, found)


def test_a_search_packs_as_a_run_would(monkeypatch):
    """The real model's batch in chunks of any size; what a program needs is made up of them."""
    shards, hbm, compiled = 8, 16 * 2**30, []

    def step(trainer, spec, batch, options):
        held = [math.prod(g.batch.tokens.shape[1:]) // shards for g in batch.groups]
        compiled.append(tuple(g.batch.tokens.shape for g in batch.groups))
        needs = int(4e9 + 6e5 * max(held))
        return SimpleNamespace(
            as_text=lambda: "",
            memory_analysis=lambda: SimpleNamespace(
                argument_size_in_bytes=10**9, temp_size_in_bytes=needs,
                output_size_in_bytes=5, alias_size_in_bytes=5,
            ),
        )  # fmt: skip

    monkeypatch.setattr(plan.aot, "compile_step", step)
    monkeypatch.setattr(plan.aot, "compile_embedding", lambda *_: step(None, None, batch, None))
    batch = SimpleNamespace(groups=())
    batch.groups = (
        SimpleNamespace(batch=SimpleNamespace(tokens=SimpleNamespace(shape=(1, 8, 8)))),
    )
    config = Config(
        model=ModelConfig(path=str(FOLDER)), adapter=AdapterConfig(type="lora"),
        data=DataConfig(path="-"), output="-", grad_cache="on", batch_size=1024,
    )  # fmt: skip
    config.packing.chunk_tokens = 2048
    report = plan.check(config, mesh.make_mesh(1, 8, 1), hbm, search_chunk=True)
    assert report["searched"] and 1 <= len(report["search"]) <= 4
    tried = {one["chunk_tokens"]: one for one in report["search"]}
    best = report["largest_chunk_tokens"]
    assert tried[best]["fits"] and not any(t["fits"] for size, t in tried.items() if size > best)
    # One more row to a chip would not fit: 0.95 of 16 GiB holds 18,867 tokens.
    row = max(g["tokens"] for g in report["groups"])
    assert best == 18_867 // row * row
    assert len(set(compiled)) == len(compiled)  # nothing is compiled twice
    (said,) = [words for subject, words in plan_words.words(report) if subject == "chunk"]
    assert "compiled and found to fit" in said and f"{best:,}" in said
    estimate = plan.check(config, mesh.make_mesh(1, 8, 1), hbm)
    assert not estimate["searched"] and "search" not in estimate
    (said,) = [words for subject, words in plan_words.words(estimate) if subject == "chunk"]
    assert "estimated" in said
