# SPDX-License-Identifier: Apache-2.0
"""Score a model on MMEB-eval, or on any folder of its layout.

    python -m vlm2vec_jax.evaluate --model DIR [--adapter DIR] --data DIR [--subsets A,B]
        --output DIR [--dtype float32]

The output folder receives, per subset, `<subset>_score.json`, `<subset>_pred.jsonl` and
`<subset>_embeddings.npz`, and over all of them `scores.json` and `scores.md`. Run it again to go on
after an interruption: what is there of the same model and the same data is used, anything else is
computed again. `python -m vlm2vec_jax.evaluation.report` makes a page with pictures of it.
"""

from typing import Any

from absl import flags

from vlm2vec_jax.flags import define_processor_options, processor_options, run

DTYPES = ("bfloat16", "float32")
SIMILARITIES = ("cosine", "dot")


def define(values: flags.FlagValues) -> None:
    """Add this command's flags."""

    def text(name: str, words: str, required: bool = False) -> None:
        flags.DEFINE_string(name, None, words, required=required, flag_values=values)

    def number(name: str, words: str) -> None:
        flags.DEFINE_integer(name, None, words, lower_bound=1, flag_values=values)

    text("model", "a model: an HF folder, a training output folder, or a hub id", required=True)
    text("adapter", "a PEFT adapter folder on top of it")
    text("data", "folder with one folder per subset", required=True)
    flags.DEFINE_list(
        "subsets", None, "names of subsets, with commas; all by default", flag_values=values
    )
    text("output", "folder for scores, predictions and embeddings", required=True)
    text("image_root", "what image paths in the data are relative to; --data by default")
    flags.DEFINE_enum("dtype", "bfloat16", DTYPES, "type of the computation", flag_values=values)
    flags.DEFINE_enum(
        "similarity", "cosine", SIMILARITIES, "how a target is scored", flag_values=values
    )
    define_processor_options(values)
    number("batch_tokens", "tokens embedded at a time; chosen for the device by default")


def main(args: Any) -> None:
    """Evaluate, print the table."""
    from rich.console import Console

    from vlm2vec_jax.evaluation import run as evaluation
    from vlm2vec_jax.evaluation import tables
    from vlm2vec_jax.evaluation.rows import Settings

    console = Console()

    def say(message: str) -> None:
        console.print(message, markup=False, highlight=False, soft_wrap=True)

    # A wrong name is told before the model is loaded, which may take minutes.
    evaluation.choose_subsets(args.data, args.subsets, args.output)

    from vlm2vec_jax.embedder import Embedder

    encoder = Embedder.from_pretrained(
        args.model,
        adapter=args.adapter,
        dtype=args.dtype,
        **processor_options(args),
    )
    for remark in getattr(encoder, "remarks", ()):
        say(remark)
    options: dict[str, Any] = {"progress": True}
    if args.batch_tokens:
        options["batch_tokens"] = args.batch_tokens
    scores = evaluation.evaluate(
        encoder,
        args.data,
        args.subsets,
        output=args.output,
        image_root=args.image_root,
        settings=Settings(args.similarity),
        encode_options=options,
        say=say,
    )
    console.print(tables.console_table(scores))
    say(f"written to {args.output}: scores.json, scores.md, and files per subset")


if __name__ == "__main__":
    run(main, define)
