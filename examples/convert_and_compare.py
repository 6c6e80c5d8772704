# SPDX-License-Identifier: Apache-2.0
"""Write a trained model in other forms and prove each conversion.

    python examples/convert_and_compare.py --model runs/mine --output runs/mine_exports

A model with an adapter is written as PEFT's adapter and with the adapter merged into a full
Hugging Face model, one without as a full model. Each export is compared with the model it came
from: every tensor, and the embeddings of `--input`, if given.
"""

import argparse
from pathlib import Path

from vlm2vec_jax import export, flags
from vlm2vec_jax.models.folders import locate
from vlm2vec_jax.weights import compare


def main() -> int:
    """Export and compare; 1 if an export is not the same."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--input", help="a jsonl file of inputs to embed with both")
    args = parser.parse_args()

    adapted = export.adapter_of(locate(args.model)) is not None
    worst = 0
    for form in ("peft", "merged") if adapted else ("hf",):
        folder = args.output / form
        folder.parent.mkdir(parents=True, exist_ok=True)
        given = ["--checkpoint", args.model, "--format", form, "--output", str(folder)]
        # Rounding to bfloat16 would be the only difference there is.
        given += ["--dtype", "float32"]
        code = flags.call(export.main, export.define, ["export", *given])
        if code:
            return code
        given = [args.model, str(folder), *(["--input", args.input] if args.input else [])]
        worst = max(worst, flags.call(compare.main, compare.define, ["compare", *given]))
    return worst


if __name__ == "__main__":
    raise SystemExit(main())
