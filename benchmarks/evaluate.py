# SPDX-License-Identifier: Apache-2.0
"""A whole evaluation against the loop of the reference, from files to scores.

The baseline is what VLM2Vec's `eval.py` does, in our own code and with our own model: for each
subset the distinct pairs of its queries and, apart from them, of its candidates, in the order of a
set, that is of chance, in batches; every input prepared when its batch is due and embedded in the
reference-shaped form; then for each query its candidates stacked, normalised, multiplied, and the
largest taken. Ours is the command's own road: plan, hashes of the images, each input once over all
subsets, packed rows, metrics, and all files written. Both give the same predictions, which is
checked. The data is mini-MMEB with fewer queries, the model the demonstration's, untrained.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from benchmarks import common
from benchmarks.common import How, Result, compared

MULTIPLE = 8
BATCH = 16
"""Inputs of a batch of the baseline, the reference's default."""


def measure(how: How) -> Result:
    """Write data and model, compare."""
    from vlm2vec_jax.data.mini_mmeb import write_mini_mmeb
    from vlm2vec_jax.models.phi3v.mini import write_mini_model

    with tempfile.TemporaryDirectory(prefix="bench_evaluate_") as name:
        folder = Path(name)
        write_mini_mmeb(folder / "mini", how.seed, how.pick(0.02, 0.005))
        write_mini_model(folder / "mini", folder / "model", how.seed)
        bench = Bench(folder, BATCH, how.seed)
        predictions = {name: case() for name, case in bench.cases.items()}
        rows = sum(map(len, predictions["loop"].values()))
        differ = sum(
            a != b
            for subset, found in predictions["loop"].items()
            for a, b in zip(found, predictions["ours"][subset], strict=True)
        )
        assert differ <= rows / 100, f"{differ} of {rows} predictions differ"
        timing = common.alternate(bench.cases, how.pick(2, 1), warm=False)
    against = f"loop as the reference's, batches of {BATCH}"
    shapes = {**bench.shapes, "rows": rows, "predictions_that_differ": differ}
    what = "from files to scores"
    return Result(
        [compared(what, against, timing, "ours", "loop", 3.0, shapes)], {"evaluate": timing}
    )


class Bench:
    """The same data and model on both roads.

    Attributes:
      cases: road -> function that evaluates everything, with the predictions of each subset.
      shapes: what was embedded.
    """

    def __init__(self, folder: Path, batch: int, seed: int):
        import jax

        from benchmarks.reference_shaped import Embedding
        from vlm2vec_jax.embedder import Embedder
        from vlm2vec_jax.models.loading import load_model
        from vlm2vec_jax.nn.compute import Compute

        self.folder, self.batch, self.seed = folder, batch, seed
        self.data = folder / "mini" / "eval"
        self.embedder = Embedder.from_pretrained(folder / "model", dtype="float32")
        module = load_model(folder / "model", dtype_of=lambda path: jax.numpy.float32).module
        layout = self.embedder.processor.visual_layout
        self.shaped = Embedding(module, layout, Compute("float32"))
        self.units = self.embedder.processor.settings["num_crops"] + 1
        self.cases = {"ours": self.ours, "loop": self.loop}
        self.shapes: dict = {}

    def ours(self) -> dict[str, list]:
        """What the command does, into a new folder."""
        import json

        from vlm2vec_jax.evaluation import run as evaluation

        output = self.folder / "out"
        shutil.rmtree(output, ignore_errors=True)
        evaluation.evaluate(self.embedder, self.data, output=output)
        found = {}
        for path in sorted(output.glob("*_pred.jsonl")):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            predicted = [(r["predicted"]["text"], r["predicted"]["image"]) for r in rows]
            found[path.name.removesuffix("_pred.jsonl")] = predicted
        return found

    def loop(self) -> dict[str, list]:
        """What the reference does."""
        import random

        import numpy as np

        from vlm2vec_jax.data.mmeb import open_eval

        order, found, embedded = random.Random(self.seed), {}, 0
        for source in open_eval(self.data):
            rows = [source[n] for n in range(len(source))]
            queries = sorted({row.query_key for row in rows})
            targets = sorted({key for row in rows for key in row.target_keys})
            order.shuffle(queries)
            order.shuffle(targets)
            embedded += len(queries) + len(targets)
            query = dict(zip(queries, self.embed(queries, source.image_root), strict=True))
            target = dict(zip(targets, self.embed(targets, source.image_root), strict=True))
            predicted = []
            for row in rows:
                q = query[row.query_key]
                t = np.stack([target[key] for key in row.target_keys])
                scores = (t @ q) / (np.linalg.norm(t, axis=1) * np.linalg.norm(q))
                predicted.append(row.target_keys[int(np.argmax(scores))])
            found[source.subset] = predicted
        self.shapes = {"subsets": len(found), "embedded_by_the_loop": embedded}
        return found

    def embed(self, keys, root):
        """Embeddings of pairs, batch by batch."""
        import numpy as np

        from vlm2vec_jax.data.mmeb import to_input

        out, processor = [], self.embedder.processor
        for start in range(0, len(keys), self.batch):
            items = [processor.encode(to_input(k, root)) for k in keys[start : start + self.batch]]
            real = len(items)
            items += items[:1] * (self.batch - real)  # one program for the last batch, too
            out.append(self.shaped(items, self.batch, self.units, MULTIPLE)[:real])
        return np.concatenate(out)
