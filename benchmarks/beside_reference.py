# SPDX-License-Identifier: Apache-2.0
"""The torch reference beside this package on the same inputs: time, and difference of embeddings.

The reference is not part of this repository; whoever has it says where it is:

    git clone -b v1 https://github.com/TIGER-AI-Lab/VLM2Vec reference     # its own requirements
    python -m benchmarks.beside_reference write --folder /tmp/beside      # a model, texts, images
    PYTHONPATH=reference <its python> benchmarks/beside_reference.py reference --folder /tmp/beside
    python -m benchmarks.beside_reference ours --folder /tmp/beside
    python -m benchmarks.beside_reference compare --folder /tmp/beside

`write` makes a small untrained Phi-3.5-Vision (with `--model` it takes a folder that you have) and
random inputs, plain files that both read. `reference` and `ours` each embed them in a process of
their own, one pinned thread, float32, and write `reference.npz` and `ours.npz`: embeddings and CPU
seconds of each round. Give them turns (reference, ours, reference, ours) where the machine is
shared: every call adds its rounds. `compare` prints both medians, their ratio and the largest
difference. `reference` needs only torch, transformers, Pillow and the checkout, nothing of this
package.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

ROUNDS = 3
BATCH = 16


def main() -> int:
    """One of the four parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("write", "reference", "ours", "compare"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="an HF folder, for `write`")
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--photos", type=int, default=4)
    args = parser.parse_args()
    if args.part == "write":
        write(args.folder, args.model, args.texts, args.photos)
        return 0
    if not (args.folder / "inputs.jsonl").exists():
        parser.error(f"{args.folder} holds no inputs: run the part `write` first")
    if args.part == "compare":
        return compare(args.folder)
    os.environ["OMP_NUM_THREADS"] = "1"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    embed = embed_reference if args.part == "reference" else embed_ours
    add(args.folder / f"{args.part}.npz", *embed(args.folder))
    return 0


def write(folder: Path, model: Path | None, texts: int, photos: int) -> None:
    """Inputs, and a model if none is given."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    if model is None:
        from vlm2vec_jax.data.mini_mmeb import write_mini_mmeb
        from vlm2vec_jax.models.phi3v.mini import write_mini_model

        write_mini_mmeb(folder / "mini", 0, 0.01)
        model = folder / "model"
        write_mini_model(folder / "mini", model, 0)
    rng = np.random.default_rng(0)
    words = "a red circle over the small blue square beside one green line near two stars".split()
    lines = []
    for n in range(texts + photos):
        count = int(np.clip(rng.lognormal(2.8, 0.7), 2, 200))
        line = {"text": " ".join(rng.choice(words, count)), "images": []}
        if n < photos:
            pixels = rng.integers(0, 256, (480, 640, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{n}.png")
            line = {"text": f"<|image_1|>\n{line['text']}", "images": [f"{n}.png"]}
        lines.append(line)
    lines = [lines[i] for i in rng.permutation(len(lines))]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "inputs.jsonl").write_text(text, encoding="utf-8")
    (folder / "beside.json").write_text(json.dumps({"model": str(model.resolve())}))
    print(f"{len(lines)} inputs in {folder}, model {model}")


def read(folder: Path) -> tuple[str, list[dict]]:
    """Folder of the model, and the inputs."""
    model = json.loads((folder / "beside.json").read_text())["model"]
    with (folder / "inputs.jsonl").open(encoding="utf-8") as lines:
        return model, [json.loads(line) for line in lines]


def embed_ours(folder: Path):
    """Embeddings and CPU seconds of each round by this package."""
    from benchmarks import common

    common.pin()
    from vlm2vec_jax import Embedder

    model, lines = read(folder)
    embedder = Embedder.from_pretrained(model, dtype="float32")
    inputs = [
        {"text": line["text"], "images": [folder / name for name in line["images"]]}
        for line in lines
    ]
    found = embedder.encode(inputs)
    seconds = []
    for _ in range(ROUNDS):
        start = time.process_time()
        embedder.encode(inputs)
        seconds.append(time.process_time() - start)
    return found, seconds


def embed_reference(folder: Path):
    """Embeddings and CPU seconds of each round by the reference's own model and processor.

    The arithmetic of its `MMEBModel.encode_input`: last hidden state of the last token, normalised;
    batches in the order given, padded to the right.
    """
    import numpy as np
    import torch
    from PIL import Image
    from src.vlm_backbone.phi3_v.modeling_phi3_v import Phi3VForCausalLM
    from src.vlm_backbone.phi3_v.processing_phi3_v import Phi3VProcessor

    torch.set_num_threads(1)
    path, lines = read(folder)
    model = Phi3VForCausalLM.from_pretrained(
        path, torch_dtype=torch.float32, attn_implementation="eager"
    ).eval()
    processor = Phi3VProcessor.from_pretrained(path)
    processor.tokenizer.padding_side = "right"

    def batch(part: list[dict]):
        out = []
        for start in range(0, len(part), BATCH):
            encoded = []
            for line in part[start : start + BATCH]:
                images = [Image.open(folder / name).convert("RGB") for name in line["images"]]
                encoded.append(processor(line["text"], images or None, return_tensors="pt"))
            ids = [e["input_ids"][0] for e in encoded]
            pad = processor.tokenizer.pad_token_id
            padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad)
            mask = torch.nn.utils.rnn.pad_sequence(
                [torch.ones_like(i) for i in ids], batch_first=True
            )
            given = {"input_ids": padded, "attention_mask": mask}
            pictured = [e for e in encoded if "pixel_values" in e]
            if pictured:
                given["pixel_values"] = [e.get("pixel_values") for e in encoded]
                given["image_sizes"] = [e.get("image_sizes") for e in encoded]
            with torch.no_grad():
                states = model(**given, return_dict=True, output_hidden_states=True)
            last = states.hidden_states[-1][torch.arange(len(ids)), mask.sum(1) - 1]
            out.append(torch.nn.functional.normalize(last, dim=-1).float().numpy())
        return np.concatenate(out)

    found = batch(lines)
    seconds = []
    for _ in range(ROUNDS):
        start = time.process_time()
        batch(lines)
        seconds.append(time.process_time() - start)
    return found, seconds


def add(path: Path, embeddings, seconds: list[float]) -> None:
    """Write the embeddings, and the seconds behind those of earlier calls."""
    import numpy as np

    if path.exists():
        with np.load(path, allow_pickle=False) as before:
            seconds = [*before["seconds"].tolist(), *seconds]
    np.savez(path, embeddings=embeddings, seconds=np.array(seconds))
    print(f"{path.name}: median of {len(seconds)} rounds {statistics.median(seconds):.3f} CPU s")


def compare(folder: Path) -> int:
    """Print medians, ratio and difference."""
    import numpy as np

    sides = {}
    for name in ("reference", "ours"):
        path = folder / f"{name}.npz"
        if not path.exists():
            print(f"{path} is missing: run the part `{name}` first")
            return 2
        with np.load(path, allow_pickle=False) as stored:
            sides[name] = stored["embeddings"], statistics.median(stored["seconds"].tolist())
    difference = np.abs(sides["reference"][0] - sides["ours"][0]).max()
    theirs, own = sides["reference"][1], sides["ours"][1]
    print(f"reference {theirs:.3f} s, ours {own:.3f} s, ratio {theirs / own:.2f}")
    print(f"largest difference of an embedding: {difference:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
