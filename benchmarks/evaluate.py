# SPDX-License-Identifier: Apache-2.0
"""A whole evaluation against the loop of the reference, from files to scores, one thread.

    python -m benchmarks.evaluate [--scale 0.05] [--subsets A,B] [--batch 16] [--rounds 3]

The baseline is what VLM2Vec's `eval.py` does, in our own code and with our own model: for each
subset the distinct pairs of its queries and, apart from them, of its candidates, in the order of a
set, that is of chance, in batches; every input prepared when its batch is due, every input a row
padded to the longest of the batch and every image to the most crops; every layer at every token,
and the language model's head behind it; then for each query its candidates stacked, normalised,
multiplied, and the largest taken. Ours is the command's own road: plan, hashes of the images, each
input once over all subsets, packed rows, metrics, and all files written. Both give the same
predictions, which is checked. The data is mini-MMEB with fewer queries, the model the
demonstration's, untrained.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from benchmarks import common

MULTIPLE = 8


def main() -> None:
    """Measure, print, write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scale", type=float, default=0.05, help="of mini-MMEB's queries")
    parser.add_argument("--subsets", help="names with commas; all of mini-MMEB by default")
    parser.add_argument("--batch", type=int, default=16, help="inputs of a batch of the baseline")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    common.pin()
    with tempfile.TemporaryDirectory(prefix="bench_evaluate_") as folder:
        run(args, Path(folder))


def run(args: argparse.Namespace, folder: Path) -> None:
    """Write data and model, compare, report."""
    from vlm2vec_jax.data.mini_mmeb import write_mini_mmeb
    from vlm2vec_jax.models.phi3v.mini import write_mini_model

    names = args.subsets.split(",") if args.subsets else None
    write_mini_mmeb(folder / "mini", args.seed, args.scale, subsets=names)
    write_mini_model(folder / "mini", folder / "model", args.seed)
    bench = Bench(folder, args.batch, args.seed)
    predictions = {name: case() for name, case in bench.cases.items()}
    rows = sum(map(len, predictions["loop"].values()))
    differ = sum(
        a != b
        for subset, found in predictions["loop"].items()
        for a, b in zip(found, predictions["ours"][subset], strict=True)
    )
    assert differ <= rows / 200, f"{differ} of {rows} predictions differ"
    timing = common.alternate(bench.cases, args.rounds)
    line = common.Comparison(
        "evaluation from files to scores",
        f"loop as the reference's, batches of {args.batch}",
        timing.ratio("loop", "ours"),
        3.0,
        (timing.median("ours"), timing.median("loop")),
        bench.shapes,
    )
    more = {"options": vars(args), "rows": rows, "predictions_that_differ": differ}
    kind = "evaluate" if names is None else "evaluate-subsets"
    path = common.report(kind, [line], {"evaluate": timing}, **more)
    print(f"{rows} rows, {differ} predictions differ; written to {path}")


class Bench:
    """The same data and model on both roads.

    Attributes:
      cases: road -> function that evaluates everything, with the predictions of each subset.
      shapes: what was embedded.
    """

    def __init__(self, folder: Path, batch: int, seed: int):
        import jax
        from flax import nnx

        from vlm2vec_jax.embedder import Embedder
        from vlm2vec_jax.models.loading import load_model
        from vlm2vec_jax.nn.compute import Compute

        self.folder, self.batch, self.seed = folder, batch, seed
        self.data = folder / "mini" / "eval"
        self.embedder = Embedder.from_pretrained(folder / "model", dtype="float32")
        module = load_model(folder / "model", dtype_of=lambda path: jax.numpy.float32).module
        graphdef, self.state = nnx.split(module)
        compute = Compute("float32")

        def padded(state, batch):
            return everything(nnx.merge(graphdef, state), batch, compute)

        self.padded = jax.jit(padded)
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
        import jax
        import jax.numpy as jnp
        import numpy as np

        from vlm2vec_jax.data.mmeb import to_input

        out, processor = [], self.embedder.processor
        for start in range(0, len(keys), self.batch):
            items = [processor.encode(to_input(k, root)) for k in keys[start : start + self.batch]]
            real = len(items)
            items += items[:1] * (self.batch - real)  # one program for the last batch, too
            batch = common.right_padded(items, processor.visual_layout, MULTIPLE, self.units)
            found, _ = self.padded(self.state, jax.tree.map(jnp.asarray, batch))
            found = np.asarray(found)
            ordered = np.empty_like(found)
            ordered[batch.slot[:, 0]] = found
            out.append(ordered[:real])
        return np.concatenate(out)


def everything(module, batch, compute):
    """Embeddings [R, D] and logits [R, T, V]: what the reference's forward pass computes."""
    import jax.numpy as jnp

    from vlm2vec_jax.nn.norm import l2_normalize

    pictures = len(batch.visual["crops"]) if batch.visual else 0
    x = module.input_embeddings(batch._replace(visual={}), compute)
    if pictures:
        front = batch._replace(**{n: getattr(batch, n)[:pictures] for n in batch._fields[:-1]})
        x = jnp.concatenate([module.input_embeddings(front, compute), x[pictures:]])
    places = module.decoder.places(batch)
    states = module.decoder.norm(module.decoder.hidden_states(x, places, compute)[-1])
    last = jnp.take_along_axis(states, batch.pool_index[:, :1, None], axis=1)[:, 0]
    return l2_normalize(last), module.lm_head(states).astype(jnp.float32)


if __name__ == "__main__":
    main()
