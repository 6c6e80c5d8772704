# SPDX-License-Identifier: Apache-2.0
"""Losses, gradients, optimizer, adapters and training curves, against the goldens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.parity_parts.tools import (
    GOLDENS,
    SHARE,
    Largest,
    Row,
    by_hf_name,
    image_file,
    load,
    read_json,
    read_npz,
    read_safetensors,
    relative,
    share_of_tolerance,
)


def losses() -> Iterator[Row]:
    """The contrastive loss and its gradients."""
    import jax

    from vlm2vec_jax.losses.contrastive import contrastive_loss

    golden = read_safetensors("training/contrastive_loss.safetensors")
    value, share = 0.0, 0.0
    for kind in ("", "_two_per_query"):
        for tau in ("0.02", "0.05", "1.0"):
            loss, grads = jax.value_and_grad(
                lambda q, p, tau=tau: contrastive_loss(q, p, temperature=float(tau))[0],
                argnums=(0, 1),
            )(golden["q"], golden["p" + kind])
            expected = float(golden[f"loss_tau{tau}{kind}"])
            value = max(value, abs(float(loss) - expected) / expected)
            found = {name: np.asarray(g) for name, g in zip("qp", grads)}
            wanted = {name: golden[f"grad_{name}_tau{tau}{kind}"] for name in "qp"}
            share = max(share, share_of_tolerance(found, wanted))
    where = "training/contrastive_loss"
    yield Row("loss", where, value, 1e-5, "relative")
    yield Row("gradients of the loss", where, share, 1, SHARE)


def full() -> Iterator[Row]:
    """Full fine-tuning: gradients of a batch, and five steps of the reference's trainer."""
    import jax

    from vlm2vec_jax.inputs import MultimodalInput
    from vlm2vec_jax.models.loading import flatten
    from vlm2vec_jax.nn.compute import Compute
    from vlm2vec_jax.parallel.mesh import make_mesh
    from vlm2vec_jax.training.optimizer import AdamW, make_schedule
    from vlm2vec_jax.training.state import Trainer
    from vlm2vec_jax.training.step import StepSpec, loss_and_grads

    said = read_json("training/training.json")
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    model = load("tiny_mha", mesh)
    processor = model.backbone.processor(
        GOLDENS / "tiny_mha", model.config, num_crops=said["num_crops"], max_len=said["max_len"]
    )

    def read(pair, side):
        name = pair[f"{side}_image"]
        images = () if name is None else (image_file(name),)
        return processor.encode(MultimodalInput(pair[f"{side}_text"], images))

    sides = [[read(pair, side) for pair in said["pairs"]] for side in ("query", "pos")]
    longest = max(len(item) for side in sides for item in side)

    def batch(numbers):
        items = [side[n] for side in sides for n in numbers]
        return _rows(items, longest, processor.visual_layout)

    args = said["trainer"]["args"]
    schedule = make_schedule(
        args["lr_scheduler_type"], args["learning_rate"], args["warmup_steps"], args["max_steps"]
    )
    optimizer = AdamW(
        schedule,
        weight_decay=args["weight_decay"],
        clip_norm=args["max_grad_norm"],
        betas=(args["adam_beta1"], args["adam_beta2"]),
        eps=args["adam_epsilon"],
    )
    trainer = Trainer.create(model, optimizer, mesh, full=True)
    spec = StepSpec(Compute("float32"), said["temperature"], cached=False)
    key = jax.random.key(0)
    gradients = jax.jit(loss_and_grads, static_argnums=(0, 1))
    golden = read_safetensors("training/full_finetune_grads.safetensors")
    loss, _, grads = gradients(
        trainer.graphdef,
        spec,
        trainer.state.params,
        trainer.frozen,
        batch(said["grads_batch"]),
        key,
    )
    where = "training/full_finetune_grads"
    yield Row("loss, full fine-tuning", where, relative(loss, golden["loss"]), 1e-5, "relative")
    found = by_hf_name(flatten(grads), model.table)
    wanted = {n.removeprefix("grad/"): g for n, g in golden.items() if n.startswith("grad/")}
    yield Row("gradients, full fine-tuning", where, share_of_tolerance(found, wanted), 1, SHARE)

    step = trainer.compile_step(spec)
    run = said["trainer"]
    norm = 0.0
    for number, parts in enumerate(zip(run["batches_rank0"], run["batches_rank1"])):
        packed = trainer.put(batch(parts[0] + parts[1]))
        trainer.state, values = step(trainer.state, trainer.frozen, packed, key)
        norm = max(norm, relative(values["grad_norm"], run["log"][number]["grad_norm"]))
    found = by_hf_name(flatten(trainer.state.params) | flatten(trainer.frozen), model.table)
    wanted = read_safetensors("training/params_after_5_steps.safetensors")
    # The true gradient of CLIP's key biases is zero: Adam moves them by rounding noise alone.
    names = [name for name in wanted if not name.endswith("self_attn.k_proj.bias")]
    off = np.concatenate([np.abs(found[name] - wanted[name]).ravel() for name in names])
    where = "training/params_after_5_steps"
    yield Row("gradient norms of 5 steps", "training", norm, 2e-5, "relative")
    yield Row("parameters after 5 steps", where, float(off.max()), 1e-4)
    yield Row(
        "parameters after 5 steps beyond 2e-6", where, float((off > 2e-6).mean()), 1e-4, "share"
    )


def _rows(items, tokens: int, layout):
    """A train batch of one chunk with an input to a row, always of the same shape."""
    from vlm2vec_jax.packing import ChunkedGroup, RowShape, fill
    from vlm2vec_jax.training.step import TrainBatch

    shape = RowShape(tokens, 2, 1)
    batch = fill([[i] for i in range(len(items))], items, shape, layout)
    lead = [leaf[None] for leaf in batch[:-1]]
    visual = {name: leaf[None] for name, leaf in batch.visual.items()}
    group = ChunkedGroup(type(batch)(*lead, visual), np.int32(1))
    return TrainBatch((group,), np.arange(len(items) // 2, dtype=np.int32))


def adapters() -> Iterator[Row]:
    """LoRA and DoRA: embeddings, loss, gradients, merged weights."""
    import jax
    from golden_batches import golden_batch, load_npz, rope_table

    from vlm2vec_jax.losses.contrastive import contrastive_loss
    from vlm2vec_jax.models.loading import add_adapter, fill, flatten
    from vlm2vec_jax.nn.compute import Compute
    from vlm2vec_jax.weights.adapters import adapter_tensors, load_adapter, merge

    exact = Compute("float32")
    for folder in sorted((GOLDENS / "adapters").iterdir()):
        name = "_".join(folder.name.split("_")[:2])
        model, said = load(name), read_json(f"adapters/{folder.name}/golden.json")
        golden = read_safetensors(f"adapters/{folder.name}/golden.safetensors")
        base = flatten(model.module)
        adapter = load_adapter(folder, model.table, base)
        scaling = {path: linear.scaling for path, linear in adapter.linears.items()}
        merged = merge(base, adapter.tensors, scaling)
        largest = Largest()
        by_name = by_hf_name(merged, model.table)
        for key, tensor in golden.items():
            if key.startswith("merged/"):
                largest.see("merged", by_name[key.removeprefix("merged/")], tensor)

        def sides(model=model, said=said):
            for side in ("query", "target"):
                file, _, rest = said[f"{side}_batch"].partition(" ")
                recorded = load_npz(GOLDENS / file)
                rows = slice(int(rest.split()[1])) if rest else None
                yield (
                    golden_batch(model.config, recorded, rows),
                    rope_table(model.config, recorded),
                )

        (queries, q_table), (targets, t_table) = sides()

        def embed(module, q=(queries, q_table), t=(targets, t_table)):
            return [module(batch, exact, rope_table=table)[:, 0] for batch, table in (q, t)]

        for found, side in zip(embed(fill(model.module, merged)), ("query", "target")):
            largest.see("merged embedding", found, golden[f"{side}_embedding_merged"])
        add_adapter(
            model.module,
            adapter.linears,
            dora=adapter.config.dora,
            dropout=0.0,
            tensors=adapter.tensors,
        )

        def objective(leaves, model=model, embed=embed, said=said):
            module = fill(model.module, {**flatten(model.module), **leaves})
            q, t = embed(module)
            return contrastive_loss(q, t, temperature=said["temperature"])[0], (q, t)

        leaves = {p: x for p, x in flatten(model.module).items() if p in adapter.tensors}
        (loss, pair), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(leaves)
        for found, side in zip(pair, ("query", "target")):
            largest.see("embedding", found, golden[f"{side}_embedding"])
        found = dict(adapter_tensors(grads, model.table, adapter.config))
        wanted = {n.removeprefix("grad/"): g for n, g in golden.items() if n.startswith("grad/")}
        # Layers that cannot matter have no gradient in the reference and a zero one here.
        assert not any(np.any(found[n]) for n in set(found) - set(wanted))
        found = {n: found[n] for n in wanted}
        where = f"adapters/{folder.name}"
        yield Row("embeddings with the adapter", where, largest["embedding"], 1e-5)
        yield Row("embeddings, merged", where, largest["merged embedding"], 1e-5)
        yield Row("merged weights", where, largest["merged"], 2e-6)
        yield Row("loss with the adapter", where, relative(loss, golden["loss"]), 1e-5, "relative")
        share = share_of_tolerance(found, wanted)
        yield Row("gradients of the adapter", where, share, 1, SHARE)


def curves() -> Iterator[Row]:
    """Twenty steps of `vlm2vec_jax.train` on eight pairs."""
    import tempfile

    from vlm2vec_jax import config, train
    from vlm2vec_jax.embedder import Embedder

    said = read_json("end_to_end/train/expected.json")
    final = read_npz("end_to_end/train/final_query_embeddings.npz")
    for kind in ("full", "lora", "dora"):
        with tempfile.TemporaryDirectory() as folder:
            adapter = "" if kind == "full" else str(GOLDENS / f"adapters/tiny_mha_{kind}_r8")
            experiment = config.Config(
                model=config.ModelConfig(str(GOLDENS / "tiny_mha"), adapter, "float32"),
                adapter=config.AdapterConfig(type="none" if kind == "full" else kind, dropout=0.0),
                data=config.DataConfig(str(GOLDENS / "end_to_end/train"), num_crops=1, max_len=48),
                optim=config.OptimConfig(said["learning_rate"][kind], said["warmup_steps"]),
                mesh=config.MeshConfig(data=1),
                batch_size=said["pairs"],
                steps=said["steps"],
                temperature=said["temperature"],
                output=folder,
                remat="none",
            )
            train.train(config.check(experiment))
            lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
            found = [json.loads(line) for line in lines if "loss" in json.loads(line)]
            queries = _queries()
            embeddings = Embedder.from_pretrained(folder, dtype="float32").encode(queries)
        largest, share = Largest(), 0.0
        largest.see("final", embeddings, final[kind])
        for ours, golden in zip(found[:8], said["log"][kind], strict=False):
            limit = max(1e-3 * golden["loss"], 1e-4)
            share = max(share, abs(ours["loss"] - golden["loss"]) / limit)
        where = f"end_to_end/train, {kind}"
        note = "share of 1e-3 relative or 1e-4 absolute"
        yield Row("losses of the first 8 of 20 steps", where, share, 1, note)
        yield Row("query embeddings after 20 steps", where, largest["final"], 5e-3)


def _queries():
    import pyarrow.parquet as pq

    from vlm2vec_jax.inputs import MultimodalInput

    folder = GOLDENS / "end_to_end/train"
    rows = pq.read_table(next((folder / "Pairs8").glob("*.parquet"))).to_pylist()
    return [
        MultimodalInput(
            row["qry"], (folder / row["qry_image_path"],) if row["qry_image_path"] else ()
        )
        for row in rows
    ]
