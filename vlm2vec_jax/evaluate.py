# SPDX-License-Identifier: Apache-2.0
"""Score a model on MMEB-eval, or on any folder of its layout.

    python -m vlm2vec_jax.evaluate --model DIR [--adapter DIR] --data DIR [--subsets A,B]
        --output DIR [--dtype float32]

The output folder receives, per subset, `<subset>_score.json`, `<subset>_pred.jsonl` and
`<subset>_embeddings.npz`, and over all of them `scores.json` and `scores.md`. Run it again to go on
after an interruption: what is there of the same model and the same data is used, anything else is
computed again. `python -m vlm2vec_jax.evaluation.report` makes a page with pictures of it.

In place of --model, other systems are scored by the same rules:

    --vectors FILE.npz|npy|parquet       vectors made elsewhere (see vlm2vec_jax.evaluation.inputs)
    --encoder module:function            a Python callable encode(inputs)
    --endpoint URL --endpoint_model NAME a server of /v1/embeddings or /v2/embed

Several machines: with --coordinator HOST:PORT --num_processes N --process_id K on each (or
--distributed, where the surroundings say them) they share the work and give the result of one. With
--shard K/N each embeds its part alone, and `python -m vlm2vec_jax.evaluation.merge` joins them.
"""

from typing import Any

from absl import flags

from vlm2vec_jax.evaluation import command
from vlm2vec_jax.flags import define_processes, run

SIMILARITIES = ("cosine", "dot")
CANDIDATES = ("own", "corpus")


def define(values: flags.FlagValues) -> None:
    """Add this command's flags."""

    def text(name: str, words: str, required: bool = False) -> None:
        flags.DEFINE_string(name, None, words, required=required, flag_values=values)

    command.define_encoder(values)
    text("data", "folder with one folder per subset", required=True)
    flags.DEFINE_list(
        "subsets", None, "names of subsets, with commas; all by default", flag_values=values
    )
    text("output", "folder for scores, predictions and embeddings", required=True)
    text("image_root", "what image paths are relative to; found in or below --data by default")
    flags.DEFINE_bool(
        "follow_symlinks",
        False,
        "open images to which a link leads out of the image root",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "similarity", "cosine", SIMILARITIES, "how a target is scored", flag_values=values
    )
    flags.DEFINE_enum(
        "candidates",
        "own",
        CANDIDATES,
        "each row's own list, or all targets of the subset",
        flag_values=values,
    )
    for name, words in (
        ("truncate_dims", "score the first so many dimensions, too: 64,256"),
        ("precisions", "score vectors of these precisions, too: int8,binary"),
    ):
        flags.DEFINE_list(name, None, words, flag_values=values)
    text("target_instruction", f"{command.TARGET_INSTRUCTION}; by default as the model was trained")
    text("shard", "K/N, K from 0: embed only this part; join the folders by evaluation.merge")
    define_processes(values)


def main(args: Any) -> None:
    """Evaluate, print the table."""
    from rich.console import Console

    from vlm2vec_jax.evaluation import run as evaluation
    from vlm2vec_jax.evaluation import tables

    console = Console()

    def say(message: str) -> None:
        console.print(message, markup=False, highlight=False, soft_wrap=True)

    # A wrong name is told before the model is loaded, which may take minutes.
    evaluation.choose_subsets(args.data, args.subsets, args.output)
    settings = scoring_settings(args)
    part = shard(args.shard)
    hosts = command.join(args)
    encoder, options = command.make_encoder(args, say)
    scores = evaluation.evaluate(
        encoder,
        args.data,
        args.subsets,
        output=args.output,
        image_root=args.image_root,
        follow_symlinks=args.follow_symlinks,
        settings=settings,
        target_instruction=args.target_instruction,
        encode_options=options,
        say=say,
        hosts=hosts,
        shard=part,
    )
    if part is None and hosts.writes:
        console.print(tables.console_table(scores))
        say(f"written to {args.output}: scores.json, scores.md, and files per subset")


def scoring_settings(args: Any):
    """How rows are scored, from the flags.

    Raises:
      UserError: dimensions that are no numbers, unknown precisions.
    """
    from vlm2vec_jax.errors import UserError
    from vlm2vec_jax.evaluation.rows import Settings

    try:
        dims = tuple(int(d) for d in args.truncate_dims or ())
    except ValueError:
        raise UserError(
            f"--truncate_dims {','.join(args.truncate_dims)}: whole numbers, with commas"
        ) from None
    settings = Settings(args.similarity, args.candidates, dims, tuple(args.precisions or ()))
    assert settings.variants is not None  # raises for what is not known
    return settings


def shard(text: str | None) -> tuple[int, int] | None:
    """The part that `--shard K/N` names.

    Raises:
      UserError: if it names none.
    """
    from vlm2vec_jax.errors import UserError

    if text is None:
        return None
    first, _, last = text.partition("/")
    if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise UserError(f"--shard {text}: write K/N with K from 0 to N - 1, as 0/4")
    return int(first), int(last)


if __name__ == "__main__":
    run(main, define)
