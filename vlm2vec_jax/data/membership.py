# SPDX-License-Identifier: Apache-2.0
"""Print which rows make up a step's global batch, as a hash or one by one.

    python -m vlm2vec_jax.data.membership --config configs/NAME.py --step N [--count K] [--list]

Steps are counted from 1, as in metrics.jsonl, whose `membership` is the beginning of the same
hash. The batch is a function of the mixture, the seed and the step alone: the hash is the same for
any number of processes, workers and devices. Rows that turn out to be bad when they are decoded
are replaced later (data.on_bad_example=skip) and do not change it.
"""

from __future__ import annotations

from typing import Any

from absl import flags

from vlm2vec_jax.flags import define_config, experiment, run


def define(values: flags.FlagValues) -> None:
    """Add this command's flags."""
    define_config(values)
    flags.DEFINE_integer(
        "step", None, "step, counted from 1", required=True, lower_bound=1, flag_values=values
    )
    flags.DEFINE_integer("count", 1, "so many steps", lower_bound=1, flag_values=values)
    flags.DEFINE_boolean("list", False, "print the rows, too", flag_values=values)


def main(args: Any) -> None:
    """Print a line per step: the step and its hash; with --list a line per pair behind it."""
    from vlm2vec_jax.training.data import open_data

    config = experiment(args)
    mixture = open_data(config).mixture
    for step in range(args.step, args.step + args.count):
        print(f"{step} {mixture.membership(step - 1, config.batch_size)}")
        if args.list:
            for source, position in mixture.batch_indices(step - 1, config.batch_size).tolist():
                print(
                    f"  {mixture.sources[source].subset} {mixture.sources[source].rows[position]}"
                )


if __name__ == "__main__":
    run(main, define)
