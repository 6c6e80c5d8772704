# SPDX-License-Identifier: Apache-2.0
"""Data sets by their hub id, where there is a network: fetched into a folder, once.

`huggingface_hub` is optional and loaded only for an id; a folder or a file never asks for it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from vlm2vec_jax.errors import UserError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(named: str) -> bool:
    """Whether something that is no path of this machine looks like a data set's id."""
    return _ID.fullmatch(named) is not None and not Path(named).exists()


def download_folder(named: str) -> Path:
    """Where a data set of the hub is kept, unless the user says otherwise."""
    return Path.home() / ".cache" / "vlm2vec_jax" / "data" / named.replace("/", "--")


def fetch(
    named: str,
    folder: Path | None = None,
    *,
    subsets: Sequence[str] = (),
    images: bool = True,
) -> Path:
    """Download a data set; files that are there already are not fetched again.

    Args:
      named: the id, e.g. "TIGER-Lab/MMEB-train".
      folder: where to; `download_folder` if None.
      subsets: fetch the tables and archives of these only; all if empty.
      images: fetch archives of images, too.

    Returns:
      The folder, in the layout of the repository.

    Raises:
      UserError: without `huggingface_hub`, a network, or a data set of this name.
    """
    folder = download_folder(named) if folder is None else folder
    patterns = []
    for subset in subsets or ("*",):
        patterns += [f"{subset}/*.parquet"]
        patterns += [f"images_zip/{subset}.zip"] if images else []
    if images:
        patterns += ["images.zip", "*.tar.gz"]
    try:
        from huggingface_hub import snapshot_download

        # Into a folder of real files: the hub's own cache is made of links out of the folder.
        snapshot_download(
            named, repo_type="dataset", local_dir=str(folder), allow_patterns=patterns
        )
    except ImportError:
        raise UserError(
            f"{named} looks like a data set of the hub, which needs huggingface_hub "
            f"(pip install huggingface_hub); or download it and name the folder"
        ) from None
    except Exception as error:  # the client raises a dozen kinds, from offline to forbidden
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(
            f"there is no folder {named}, and as a hub id it cannot be fetched: {reason}"
        ) from None
    return folder


def local_data(named: str | os.PathLike) -> Path:
    """The folder or file of a `data.path`; a hub id is what `prepare` made of it.

    Raises:
      UserError: if it is neither there nor prepared, with the command that prepares it.
    """
    if not is_hub_id(str(named)):
        return Path(named)
    folder = download_folder(str(named))
    if folder.is_dir():
        return folder
    raise UserError(
        f"there is no folder {named}; if it is a data set of the hub, fetch and unpack it first: "
        f"python -m vlm2vec_jax.data.prepare --data {named}"
    )
