# SPDX-License-Identifier: Apache-2.0
"""Full exports of ours in an old transformers: run by the python of an environment that has one.

    python tests/tools/old_transformers.py OUTPUT.npz INPUTS.npz CLASS=FOLDER...

Needs torch and transformers 4.4x, and nothing of this package. Each folder is loaded by a class of
transformers. Written are, by folder name, the states of a text's tokens (positions 0, 1, ...), what
transformers says about the loading, every tensor that it holds, and once the versions. A class that
this transformers does not have is left out.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import transformers


def main(output: str, inputs: str, *models: str) -> None:
    """Load, compute and write."""
    torch.set_num_threads(1)
    given, out = dict(np.load(inputs)), {}
    for pair in models:
        cls, _, folder = pair.partition("=")
        name = Path(folder).name
        if not hasattr(transformers, cls):
            continue
        model, said = getattr(transformers, cls).from_pretrained(
            folder, torch_dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        ids = torch.from_numpy(given[name])[None]
        # 4.46 has the text model of LLaVA one level further down, and no road for texts alone.
        text = getattr(model, "language_model", model).eval().model
        with torch.no_grad():
            out[f"{name}/states"] = text(ids, use_cache=False).last_hidden_state[0].numpy()
        out[f"{name}/said"] = np.array(
            json.dumps({k: sorted(map(str, v)) for k, v in said.items()})
        )
        for key, tensor in model.state_dict().items():
            out[f"{name}/tensors/{key}"] = tensor.numpy()
    found = {package: version(package) for package in ("torch", "transformers")}
    np.savez(output, versions=np.array(json.dumps(found)), **out)


if __name__ == "__main__":
    main(*sys.argv[1:])
