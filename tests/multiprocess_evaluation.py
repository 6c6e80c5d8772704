# SPDX-License-Identifier: Apache-2.0
"""One process of `test_evaluation_processes.py`: the command, with devices of its own.

python multiprocess_evaluation.py FLAGS OF EVALUATE
"""

import os
import sys

from vlm2vec_jax import evaluate, flags

if os.environ.get("ANOTHER_MODEL"):
    from vlm2vec_jax.embedder import Embedder

    known = Embedder.fingerprint
    Embedder.fingerprint = lambda self: {**known(self), "other": True}  # type: ignore

if __name__ == "__main__":
    sys.exit(flags.call(evaluate.main, evaluate.define, sys.argv))
