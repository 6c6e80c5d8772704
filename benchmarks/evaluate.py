# SPDX-License-Identifier: Apache-2.0
"""A whole evaluation against the loop of the reference, from files to scores.

The baseline is what VLM2Vec's `eval.py` does, in our own code (`reference_eval.py` says what). Ours
is the command's own road: the quick check of the data, plan, hashes of the images, each input once
over all subsets, packed rows, metrics, and all files written. Both give the same predictions, which
is checked. The model is the demonstration's, untrained, with the demonstration's settings. Two
sets of data:

* mini-MMEB, whole: 30 datasets with their own pictures, 300 candidates at most;
* an MMEB-like one (`mmeb_like.py`): ten datasets with lists of 1000 that share labels and
  pictures.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from benchmarks import common
from benchmarks.common import How, Result, Row
from benchmarks.peak import peak


def measure(how: How) -> Result:
    """Write data and model, compare."""
    from benchmarks.mmeb_like import write_mmeb_like
    from vlm2vec_jax.data.mini_mmeb import write_mini_mmeb
    from vlm2vec_jax.models.phi3v.mini import write_mini_model

    rows, timings = [], {}
    with tempfile.TemporaryDirectory(prefix="bench_evaluate_") as name:
        folder = Path(name)
        write_mini_mmeb(folder / "mini", how.seed, how.pick(1.0, 0.005))
        write_mini_model(folder / "mini", folder / "model", how.seed)
        data = {"mini-MMEB, files to scores": folder / "mini" / "eval"}
        if not how.quick:
            write_mmeb_like(folder / "mini" / "eval", folder / "like", 100, how.seed)
            data["MMEB-like, 1000 candidates"] = folder / "like"
        for what, path in data.items():
            row, timing = compare(what, folder, path, how)
            rows.append(row)
            timings[what] = timing
    return Result(rows, timings)


def compare(what: str, folder: Path, data: Path, how: How) -> tuple[Row, common.Timing]:
    """Measure one set of data with the model in `folder`."""
    bench = Bench(folder, data, how.seed)
    predictions = {name: case() for name, case in bench.cases.items()}
    rows = sum(map(len, predictions["loop"].values()))
    differ = sum(
        a != b
        for subset, found in predictions["loop"].items()
        for a, b in zip(found, predictions["ours"][subset], strict=True)
    )
    assert differ <= rows / 100, f"{differ} of {rows} predictions differ"
    timing = common.alternate(bench.cases, how.pick(3, 1), warm=False)
    shapes = {
        "subsets": len(predictions["loop"]),
        "rows": rows,
        "predictions_that_differ": differ,
        "embedded_by_the_loop": bench.baseline.embedded,
        "embedded_by_ours": bench.embedded,
        # What the distinct inputs' useful FLOPs take at the rate of a large matrix product: no
        # evaluation of this model is faster on one thread.
        "least_seconds": bench.useful_flops() / peak(how),
    }
    against = "loop as the reference's, batches of 16"
    return common.compared(what, against, timing, "ours", "loop", 3.0, shapes), timing


class Bench:
    """The same data and model on both roads.

    Attributes:
      cases: road -> function that evaluates everything, with the predictions of each subset.
      baseline: the loop.
      embedded: inputs that ours embedded in its last call.
    """

    def __init__(self, folder: Path, data: Path, seed: int):
        import jax

        from benchmarks.reference_eval import Loop
        from vlm2vec_jax.embedder import Embedder
        from vlm2vec_jax.models.loading import load_model
        from vlm2vec_jax.models.phi3v.processor import Phi3VProcessor

        self.folder, self.data = folder, data
        self.embedder = Embedder.from_pretrained(folder / "model", dtype="float32")
        processor = self.embedder.processor
        assert isinstance(processor, Phi3VProcessor)
        self.model = load_model(folder / "model", dtype_of=lambda path: jax.numpy.float32)
        self.baseline = Loop(self.model.module, processor, data, seed)
        self.cases = {"ours": self.ours, "loop": self.loop}
        self.embedded = 0

    def ours(self) -> dict[str, list]:
        """What the command does, into a new folder."""
        import json

        from vlm2vec_jax.evaluation import run as evaluation

        self.embedded = 0
        output = self._fresh()
        evaluation.evaluate(
            self.embedder, self.data, output=output, encode_options={"progress": self._count}
        )
        found = {}
        for path in sorted(output.glob("*_pred.jsonl")):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            predicted = [(r["predicted"]["text"], r["predicted"]["image"]) for r in rows]
            found[path.name.removesuffix("_pred.jsonl")] = predicted
        return found

    def useful_flops(self) -> float:
        """Of all inputs, each text with the bytes of its picture once."""
        from benchmarks.reference_eval import distinct_pairs
        from vlm2vec_jax.data.source import to_input

        inputs = {}
        for text, picture in distinct_pairs(self.data):
            content = (self.data / picture).read_bytes() if picture else b""
            inputs[text, content] = to_input((text, picture), self.data)
        encoded = (self.embedder.processor.encode(item) for item in inputs.values())
        flops, config = self.model.backbone.flops, self.model.config
        return sum(flops(config, len(item), item.units) for item in encoded)

    def _count(self, inputs: int) -> None:
        self.embedded += inputs

    def loop(self) -> dict[str, list]:
        """What the reference does, into a new folder."""
        return self.baseline(self._fresh())

    def _fresh(self) -> Path:
        output = self.folder / "out"
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir()
        return output
