# SPDX-License-Identifier: Apache-2.0
"""Embed and search a folder of photos.

    python examples/search_photos.py --model MODEL --photos FOLDER --query "a dog on a beach"

The first run embeds the folder and keeps the vectors in `FOLDER.npz`; later ones search at once,
until photos come or go. `python -m vlm2vec_jax.embed` and `python -m vlm2vec_jax.search` do the
same for corpora of any size; here is how to do it in a program.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from vlm2vec_jax import Embedder
from vlm2vec_jax.embedding.corpus import images_below


def photo_vectors(embedder: Embedder, photos: Path) -> tuple[list[str], np.ndarray]:
    """Paths of the photos and their vectors, embedded only if something has changed."""
    paths = [str(photos / name) for name in images_below(photos)]
    made_with = json.dumps([embedder.fingerprint(), [(p, Path(p).stat().st_mtime) for p in paths]])
    kept = photos.with_suffix(".npz")
    if kept.exists():
        with np.load(kept, allow_pickle=False) as file:
            if str(file["made_with"]) == made_with:
                return paths, file["vectors"]
    # A stream holds only a few photos at a time, however many there are.
    vectors = np.stack(list(embedder.encode_stream(map(Path, paths), progress=True)))
    np.savez(kept, vectors=vectors, made_with=made_with)
    return paths, vectors


def main() -> None:
    """Embed, search, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a model folder or hub id")
    parser.add_argument("--photos", required=True, type=Path)
    parser.add_argument("--query", required=True, help="words, or the path of a photo")
    parser.add_argument("--top_k", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()

    with Embedder.from_pretrained(args.model, dtype=args.dtype) as embedder:
        paths, vectors = photo_vectors(embedder, args.photos)
        # A str is always text; a Path is always an image.
        query = Path(args.query) if Path(args.query).is_file() else args.query
        scores = embedder.similarity(embedder.encode_query([query]), vectors)[0]
    for place in np.argsort(-scores, kind="stable")[: args.top_k]:
        print(f"{scores[place]:.4f}  {paths[place]}")


if __name__ == "__main__":
    main()
