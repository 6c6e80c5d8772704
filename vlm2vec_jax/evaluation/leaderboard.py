# SPDX-License-Identifier: Apache-2.0
"""The leaderboard's JSON from an evaluation's results, in the form of MMEB-V2's score files.

    python -m vlm2vec_jax.evaluation.leaderboard --results DIR --output FILE.json --model_name NAME
        [--model_backbone qwen2_vl] [--model_size "2B parameters"] [--embedding_dimension 1536]
        [--max_length_tokens 256] [--release_date YYYY-MM-DD] [--url URL]

`metrics.image` holds for each of the 36 image datasets hit, nDCG (linear and exponential),
precision, recall, F1, MAP and MRR at 1, 5 and 10 as fractions, with `num_pred` and `num_data`. A
dataset that was not scored holds the words `FILE_N/A`, as the leaderboard's own script writes it.
"""

from __future__ import annotations

import datetime
import os
import re
from pathlib import Path
from typing import Any

from absl import flags

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.evaluation import metrics, mmeb, store
from vlm2vec_jax.flags import run

MISSING = "FILE_N/A"
BROKEN = "JSON_ERROR"


def report(results: str | os.PathLike, metadata: dict[str, Any]) -> dict[str, Any]:
    """The leaderboard's JSON.

    Args:
      results: output folder of `evaluate`.
      metadata: what stands in front; the date of the report is added, and the vectors' dimension
        where it is not given.

    Returns:
      `{"metadata": {...}, "metrics": {"image": {dataset: scores}, "video": {}, "visdoc": {}}}`.

    Raises:
      UserError: a folder without any score, or scores of several models.
    """
    folder = Path(results)
    image: dict[str, Any] = {}
    made_with: dict[str, Any] = {}
    dimension = None
    for dataset in mmeb.DATASETS:
        spellings = (dataset.name, dataset.train_name)
        path = next(
            (p for p in (store.score_path(folder, n) for n in spellings) if p.exists()), None
        )
        if path is None:
            image[dataset.name] = MISSING
            continue
        score = store.read_json(path)
        if score is None or not isinstance(score.get("metrics"), dict):
            image[dataset.name] = BROKEN
            continue
        own = score.get("fingerprint", {}).get("encoder")
        first = made_with.setdefault("encoder", (path.name, own))
        if store.differences(first[1], own):
            raise UserError(f"{path.name} in {folder} is of another model than {first[0]}")
        dimension = score.get("dimension", dimension)
        image[dataset.name] = {
            **{f"{n}@{k}": score["metrics"][f"{n}@{k}"] for n in metrics.NAMES for k in metrics.KS},
            "num_pred": score["num_pred"],
            "num_data": score.get("num_data", score["num_pred"]),
        }
    if not made_with:
        raise UserError(f"{folder} holds no scores of MMEB's datasets; run evaluate first")
    now = datetime.datetime.now().replace(microsecond=0).isoformat()
    head = {"embedding_dimension": dimension, **{k: v for k, v in metadata.items() if v}}
    return {
        "metadata": {**head, "data_source": "Self-Reported", "report_generated_date": now},
        "metrics": {"image": image, "video": {}, "visdoc": {}},
    }


def define(values: flags.FlagValues) -> None:
    """Add this command's flags."""
    for name, words, required in (
        ("results", "output folder of evaluate", True),
        ("output", "the JSON file to write", True),
        ("model_name", "the name on the leaderboard", True),
        ("model_backbone", "the kind of model, as qwen2_vl", False),
        ("model_size", "in words, as 2B parameters", False),
        ("release_date", "of the model, YYYY-MM-DD", False),
        ("url", "where the model can be had", False),
    ):
        flags.DEFINE_string(name, None, words, required=required, flag_values=values)
    for name, words in (
        ("embedding_dimension", "of a vector; as evaluated by default"),
        ("max_length_tokens", "most tokens of an input"),
    ):
        flags.DEFINE_integer(name, None, words, lower_bound=1, flag_values=values)


def main(args: Any) -> None:
    """Write the file and say what is missing in it."""
    if args.release_date and not re.fullmatch(r"\d{4}-\d{2}-\d{2}", args.release_date):
        raise UserError(f"--release_date {args.release_date}: write YYYY-MM-DD")
    metadata = {
        "model_name": args.model_name,
        "model_backbone": args.model_backbone,
        "model_size": args.model_size,
        "embedding_dimension": args.embedding_dimension,
        "max_length_tokens": args.max_length_tokens,
        "model_release_date": args.release_date,
        "url": args.url,
    }
    found = report(args.results, metadata)
    store.write_json(args.output, found)
    image = found["metrics"]["image"]
    missing = [n for n, s in image.items() if isinstance(s, str)]
    print(f"{len(image) - len(missing)} of {len(image)} datasets written to {args.output}")
    if missing:
        print(f"without scores: {', '.join(missing)}")


if __name__ == "__main__":
    run(main, define)
