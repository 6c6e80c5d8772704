# SPDX-License-Identifier: Apache-2.0
"""From text and files to embeddings and scores, against the goldens."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np

from benchmarks.parity_parts.tools import (
    GOLDENS,
    MODELS,
    Largest,
    Row,
    image_file,
    load,
    read_json,
    read_npz,
)


def tokens() -> Iterator[Row]:
    """Texts and images to tokens."""
    from vlm2vec_jax.inputs import MultimodalInput
    from vlm2vec_jax.models.phi3v.processor import Phi3VProcessor
    from vlm2vec_jax.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(GOLDENS / "tiny_mha")
    cases = read_json("text_processing/text_processing.json")["processor_cases"]
    wrong = 0
    for case in cases:
        if "error" in case:
            continue
        processor = Phi3VProcessor(tokenizer, num_crops=case["num_crops"], max_len=case["max_len"])
        images = tuple(image_file(name) for name in case["images"])
        found = processor.encode(MultimodalInput(case["text"], images))
        runs = (r if isinstance(r, list) else [r, 1] for r in case["input_ids_rle"])
        golden = np.concatenate([np.full(n, i) for i, n in runs])
        wrong += len(found) != len(golden) or bool(
            (found.tokens != np.maximum(golden, 0)).any()
            or ((found.feature_index >= 0) != (golden < 0)).any()
        )
    yield Row("tokens", "text_processing", wrong, 0, f"inputs of {len(cases)} that differ")


def pixels() -> Iterator[Row]:
    """Image files to crops."""
    import hashlib

    from vlm2vec_jax.inputs import MultimodalInput
    from vlm2vec_jax.models.phi3v import hd_transform
    from vlm2vec_jax.models.phi3v.processor import Phi3VProcessor
    from vlm2vec_jax.models.phi3v.vision import with_global_views
    from vlm2vec_jax.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(GOLDENS / "tiny_mha")
    meta, processed = (
        read_json("image_processing/meta.json"),
        read_npz("image_processing/processed.npz"),
    )
    largest, wrong, count = Largest(), 0, 0
    for num_crops in (1, 4, 16):
        processor = Phi3VProcessor(tokenizer, num_crops=num_crops)
        for name, image in meta["images"].items():
            result = image["results"][str(num_crops)]
            if "error" in result:
                continue
            visual = processor.encode(MultimodalInput(images=(image_file(name),))).visual
            crops, info = visual["crops"], visual["crop_info"]
            whole = np.ascontiguousarray(hd_transform.assemble_image(crops, info))
            count += 1
            wrong += hashlib.sha256(whole.tobytes()).hexdigest() != result["hd_uint8_sha256"]
            golden = processed[f"{name}__nc{num_crops}__sub"].transpose(0, 2, 3, 1)
            made = np.asarray(with_global_views(crops[None], info[None]))[0]
            largest.see("local", made[1 - len(golden) :, 5::16, 3::16], golden[1:])
            largest.see("global", made[0, 5::16, 3::16], golden[0])
    where = "image_processing"
    yield Row("crops before normalisation", where, wrong, 0, f"images of {count} that differ")
    yield Row("normalised crops", where, largest["local"], 2e-6, "of values from -1.8 to 2.2")
    yield Row("global views made on the device", where, largest["global"], 2e-5)


def forward() -> Iterator[Row]:
    """Recorded batches through the model, stage by stage."""
    import jax.numpy as jnp
    from golden_batches import golden_batch, load_npz, rope_table

    from vlm2vec_jax.nn.compute import Compute

    exact = Compute("float32")
    for name in MODELS:
        model, largest, cosine = load(name), Largest(), 1.0
        module = model.module
        files = sorted((GOLDENS / "forward" / name).glob("*.npz"))
        for file in files:
            golden = load_npz(file)
            batch, table = golden_batch(model.config, golden), rope_table(model.config, golden)
            mask = golden["attention_mask"][..., None]

            def see(key, found, golden=golden, largest=largest):
                if key in golden:
                    largest.see(_stage(key), found, golden[key])

            x = module.input_embeddings(batch, exact)
            see("inputs_embeds", x * mask)
            places = module.decoder.places(batch, table)
            see("rope_cos", places.cos[:1])
            see("rope_sin", places.sin[:1])
            states = module.decoder.hidden_states(x, places, exact)
            for number, state in enumerate(states[:-1], start=1):
                see(f"hidden_after_layer_{number}", state * mask)
            see(f"hidden_after_layer_{len(states)}_prenorm", states[-1] * mask)
            normed = module.decoder.norm(states[-1])
            see("last_hidden_state", normed * mask)
            if "logits" in golden:
                largest.see("logits", module.lm_head(normed) * mask, golden["logits"] * mask)
            see("pooled", module.pooled(batch, exact, rope_table=table)[:, 0])
            see("embedding", module(batch, exact, rope_table=table)[:, 0])
            half = np.asarray(module(batch, Compute("bfloat16"), rope_table=table)[:, 0])
            cosine = min(cosine, float(np.sum(half * golden["embedding"], axis=-1).min()))
            if batch.visual:
                rows, at = np.nonzero(batch.feature_index >= 0)
                features = np.asarray(module.vision.table(batch.visual, exact))
                see("image_embeds", features[rows, batch.feature_index[rows, at]])
                used = [
                    batch.visual["pixels"][row, c]
                    for row in range(len(batch.tokens))
                    for c in range(sum(golden["crops_used"][golden["image_row"] == row]))
                ]
                used = jnp.asarray(np.stack(used))
                see("clip_features", module.vision.clip(used, exact))
                if "clip_hidden_0_crop0" in golden:
                    for i, state in enumerate(module.vision.clip.hidden_states(used[:1], exact)):
                        see(f"clip_hidden_{i}_crop0", state[0])
        where = f"forward/{name}"
        order = (
            ("rope tables", 1e-6),
            ("states of each CLIP layer", 1e-4),
            ("CLIP features", 1e-4),
            ("projected features", 1e-4),
            ("input embeddings", 1e-4),
            ("states after each decoder layer", 1e-4),
            ("states after the final norm", 1e-4),
            ("logits", 1e-4),
            ("pooled states", 1e-4),
            ("embeddings", 1e-5),
        )
        for stage, limit in order:
            if stage in largest:
                yield Row(stage, where, largest[stage], limit)
        note = "smallest cosine with the float32 golden"
        yield Row("embeddings in bfloat16", where, cosine, 0.999, note, at_least=True)


def _stage(key: str) -> str:
    for start, stage in (
        ("rope", "rope tables"),
        ("clip_hidden", "states of each CLIP layer"),
        ("clip_features", "CLIP features"),
        ("image_embeds", "projected features"),
        ("inputs_embeds", "input embeddings"),
        ("hidden_after", "states after each decoder layer"),
        ("last_hidden", "states after the final norm"),
        ("pooled", "pooled states"),
        ("embedding", "embeddings"),
    ):
        if key.startswith(start):
            return stage
    raise ValueError(key)


def scores() -> Iterator[Row]:
    """Evaluation: predictions over candidate lists."""
    from vlm2vec_jax.evaluation import scoring

    for subset in ("ImgToText", "TextToImg", "Mixed"):
        rows, index = (
            read_json(f"evaluation/{subset}_rows.json"),
            read_json(f"evaluation/{subset}_index.json"),
        )
        arrays = read_npz(f"evaluation/{subset}_embeddings.npz")
        place = {
            side: {(k["text"], k["img_path"]): n for n, k in enumerate(index[side])}
            for side in ("qry", "tgt")
        }
        keys = [list(zip(row["tgt_text"], row["tgt_img_path"])) for row in rows]
        queries = [place["qry"][row["qry_text"], row["qry_img_path"]] for row in rows]
        lists = [[place["tgt"][key] for key in row] for row in keys]
        wrong = 0
        for normalized, similarity in ((True, "cosine"), (False, "dot")):
            found = scoring.judge(
                arrays["qry"], arrays["tgt"], queries, lists, similarity=similarity
            )
            expected = read_json("evaluation/expected.json")[subset][f"normalize_{normalized}"]
            said = [str(row[p]) for row, p in zip(keys, found.prediction)]
            wrong += sum(a != b for a, b in zip(said, expected["pred"], strict=True))
            wrong += found.accuracy != expected["score"]["acc"]
        note = f"predictions and scores of 2 x {len(rows)} that differ"
        yield Row("scores", f"evaluation/{subset}", wrong, 0, note)


def end_to_end() -> Iterator[Row]:
    """Texts and PNG files to embeddings."""
    from vlm2vec_jax.embedder import Embedder
    from vlm2vec_jax.inputs import MultimodalInput

    file = GOLDENS / "end_to_end/inputs.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    inputs = [
        MultimodalInput(line["text"], tuple(file.parent / path for path in line["images"]))
        for line in lines
    ]
    golden = read_npz("end_to_end/expected_embeddings.npz")
    for name in golden:
        if name == "lengths":
            continue
        base = "_".join(name.split("_")[:2])
        adapter = None if name == base else GOLDENS / "adapters" / name
        embedder = Embedder.from_pretrained(GOLDENS / base, adapter, "float32")
        largest = Largest()
        largest.see("all", embedder.encode(inputs), golden[name])
        yield Row(
            f"embeddings of {len(inputs)} inputs", f"end_to_end, {name}", largest["all"], 2e-5
        )
