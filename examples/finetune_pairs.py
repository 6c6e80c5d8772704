# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a model with LoRA on your own pairs.

    python examples/finetune_pairs.py --model MODEL --pairs pairs.jsonl --output runs/mine

A line of the file is `{"query": ..., "positive": ...}`; each side is a text or
`{"text": "...", "images": ["path", ...]}`. The last tenth of the lines is not learned from: for
its queries the right target is looked for among all its targets, before and after.
"""

import argparse
import json
from pathlib import Path

from vlm2vec_jax import Embedder, MultimodalInput, flags, train

CONFIG = Path(__file__).parent.parent / "configs" / "mini.py"


def read_side(value, root: Path) -> MultimodalInput:
    """One side of a pair; image paths are relative to the file."""
    return MultimodalInput.of(value).relative_to(root)


def accuracy(embedder: Embedder, pairs: list[dict], root: Path) -> float:
    """Share of queries whose own target is the nearest."""
    queries = embedder.encode([read_side(p["query"], root) for p in pairs])
    targets = embedder.encode([read_side(p["positive"], root) for p in pairs])
    nearest = embedder.similarity(queries, targets).argmax(axis=1)
    return float((nearest == range(len(pairs))).mean())


def main() -> int:
    """Split, train, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()

    root = args.pairs.parent
    pairs = [json.loads(line) for line in args.pairs.read_text().splitlines() if line.strip()]
    held_out = max(len(pairs) // 10, 2)
    learned = root / f"{args.pairs.stem}.train.jsonl"
    learned.write_text("".join(json.dumps(pair) + "\n" for pair in pairs[:-held_out]))
    test = pairs[-held_out:]

    with Embedder.from_pretrained(args.model, dtype=args.dtype) as embedder:
        before = accuracy(embedder, test, root)
    fields = {
        "model.path": args.model,
        "model.dtype": args.dtype,
        "adapter.type": "lora",
        "adapter.rank": args.rank,
        "data.path": learned,
        "data.subsets": "",
        "output": args.output,
        "steps": args.steps,
        "optim.warmup_steps": max(args.steps // 10, 1),
        "batch_size": args.batch_size,
        "checkpoint.every": args.steps,
    }
    given = [f"--config.{name}={value}" for name, value in fields.items()]
    code = flags.call(train.main, train.define, ["train", "--config", str(CONFIG), *given])
    if code:
        return code
    with Embedder.from_pretrained(args.output, dtype=args.dtype) as embedder:
        after = accuracy(embedder, test, root)
    print(f"right targets among {len(test)}: {before:.0%} before, {after:.0%} after")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
