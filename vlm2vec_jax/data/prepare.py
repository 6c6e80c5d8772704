# SPDX-License-Identifier: Apache-2.0
"""Make a data set ready: unpack its images and convert its tables, once, for all processes.

    python -m vlm2vec_jax.data.prepare --data DIR [--output DIR] [--subsets A,B] [--tfds DIR]

DIR is MMEB-train or MMEB-eval as the hub serves them (`<Subset>/<split>-*.parquet` with
`images_zip/<Subset>.zip` or `images.zip`), own pairs, or a hub id where there is a network.
Archives are unpacked under DIR (or --output), where the rows look for their images; nothing is
written anywhere else, and links, absolute paths, `..` and bombs are refused. Parquet becomes
memory-mapped Arrow files in DIR/.arrow_cache. Run it again after an interruption: what is done
is not done twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from vlm2vec_jax.data import archives, embedded, hub
from vlm2vec_jax.data.mmeb import EvalSource
from vlm2vec_jax.data.opening import AnySource, open_all
from vlm2vec_jax.data.paths import IMAGE_FOLDERS, find_image_root
from vlm2vec_jax.data.placement import find_placement
from vlm2vec_jax.data.verify import image_folders, image_paths
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.flags import run

Say = Callable[[str], None]

STATE = ".prepared"
"""Folder below the output that remembers which archives are unpacked."""

_LOCK = ".prepare.lock"
_EXAMPLES = 3


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What there is after preparing.

    Attributes:
      sources: every subset and split, converted.
      unpacked: archive -> images written by this run (0: all were there).
      image_root: what image paths are relative to.
      images: image files that rows name.
      missing: of these, how many are not there.
      example: one that is missing, "" if none is.
    """

    sources: tuple[AnySource, ...]
    unpacked: dict[str, int]
    image_root: Path
    images: int
    missing: int
    example: str


def prepare(
    data: Path,
    output: Path | None = None,
    *,
    subsets: Sequence[str] = (),
    splits: Sequence[str] = (),
    limits: archives.Limits = archives.Limits(),  # noqa: B008 (frozen)
    workers: int = 4,
    cache_dir: str | os.PathLike | None = None,
    force: bool = False,
    say: Say = lambda message: None,
) -> Prepared:
    """Unpack the archives of a data folder and convert its tables.

    Args:
      data: a data folder or file.
      output: where images go; the data folder if None.
      subsets: only these subsets and their archives; all if empty.
      splits: only these splits; all if empty.
      limits: what an archive stays below.
      workers: threads that unpack.
      cache_dir: where converted tables go; `<data>/.arrow_cache` if None.
      force: look through archives that are unpacked already, file by file.
      say: told what is being done.

    Raises:
      UserError: for anything that cannot be read, may not be unpacked, or cannot be written.
    """
    folder = data.parent if data.is_file() else data
    output = folder if output is None else output
    sources = open_all(data, subsets, splits, cache_dir=cache_dir)
    rows = sum(len(source) for source in sources)
    say(f"{len(sources)} tables with {rows:,} rows are converted")
    unpacked: dict[str, int] = {}
    found = [path for path in _archives(folder) if not subsets or _belongs(path, subsets)]
    if found:
        with _alone(output):
            for path in found:
                count = _unpack(path, sources, output, limits, workers, force, say)
                unpacked[str(path.relative_to(folder))] = count
    wanted = list(dict.fromkeys(path for source in sources for path in image_paths(source)))
    files = [path for path in wanted if not path.startswith(embedded.PREFIX)]
    root = find_image_root(output, files[:: max(1, len(files) // 64)])
    sources = open_all(data, subsets, splits, image_root=root, cache_dir=cache_dir)
    (images, *_) = image_folders(sources)
    gone = [path for path in wanted if images.fault(path) is not None]
    return Prepared(tuple(sources), unpacked, root, len(wanted), len(gone), gone[0] if gone else "")


def _archives(folder: Path) -> list[Path]:
    """The archives of images of a data folder: in it, and in its `images_zip`."""
    places = [folder, folder / "images_zip"]
    return [
        path
        for place in places
        if place.is_dir()
        for path in sorted(place.iterdir())
        if path.is_file() and archives.is_archive(path) and path.name[0] != "."
    ]


def _belongs(path: Path, subsets: Sequence[str]) -> bool:
    """Whether an archive may hold images of these subsets: it is theirs, or one for all."""
    return path.parent.name != "images_zip" or path.name.partition(".")[0] in subsets


def _unpack(
    path: Path,
    sources: Sequence[AnySource],
    output: Path,
    limits: archives.Limits,
    workers: int,
    force: bool,
    say: Say,
) -> int:
    stem = path.name.partition(".")[0]
    state = output / STATE / f"{path.name}.json"
    facts = {"bytes": path.stat().st_size, "modified": path.stat().st_mtime_ns}
    if not force and _read_json(state).get("archive") == facts:
        say(f"{path.name}: unpacked already")
        return 0
    own = [source for source in sources if source.subset == stem] or sources
    wanted = list(dict.fromkeys(p for source in own for p in image_paths(source)))
    members = [m for m in archives.list_members(path, limits) if not archives.is_litter(m.name)]
    placement = find_placement([m.name for m in members], wanted)
    if placement is None:
        raise UserError(
            f"{path}: no row names any of its {len(members):,} files; it holds "
            f"{_some([m.name for m in members])}, and rows name {_some(wanted)}"
        )
    target = output / image_folder(own, wanted)
    say(f"{path.name}: {len(members):,} files to {target / placement.add}")
    shutil.rmtree(target / archives.TEMPORARY, ignore_errors=True)  # of a run that was killed
    count = archives.unpack(path, members, target, placement, workers=workers)
    known = {"archive": facts, "files": len(members), "placement": placement._asdict()}
    _write_json(state, known)
    return count


def image_folder(sources: Sequence[AnySource], wanted: Sequence[str]) -> str:
    """The folder below the output that image paths are relative to; "" for the output itself.

    Paths that begin with one of `paths.IMAGE_FOLDERS` are relative to the data folder, as
    MMEB-train's; MMEB-eval's are relative to its `eval_images`.
    """
    first = [path.partition("/")[0] for path in wanted[:: max(1, len(wanted) // 64)]]
    if not first or sum(name in IMAGE_FOLDERS for name in first) * 2 > len(first):
        return ""
    return "eval_images" if all(isinstance(s, EvalSource) for s in sources) else "images"


@contextlib.contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Hold the output folder against another run of this command."""
    output.mkdir(parents=True, exist_ok=True)
    with open(output / _LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{output}: another prepare is at work here; wait for it") from None
        yield


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:_EXAMPLES])) or "nothing"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(part, path)


def define(values: flags.FlagValues) -> None:
    """Add this command's flags."""

    def text(name: str, about: str, required: bool = False) -> None:
        flags.DEFINE_string(name, None, about, required=required, flag_values=values)

    text("data", "data folder or file, or a data set's id on the hub", required=True)
    text("output", "where images go; --data by default, or a cache folder for a hub id")
    flags.DEFINE_list("subsets", [], "only these subsets; all by default", flag_values=values)
    flags.DEFINE_list("splits", [], "only these splits; all by default", flag_values=values)
    text("cache_dir", "where converted tables go; <data>/.arrow_cache by default")
    text("tfds", "also write the data as a TFDS data set (array_record) below this folder")
    flags.DEFINE_integer("workers", 4, "threads that unpack", 1, flag_values=values)
    flags.DEFINE_float(
        "max_unpacked_gb", None, "most gigabytes that one archive may unpack to; 100 times its "
        "own size by default", 0.0, flag_values=values,
    )  # fmt: skip
    flags.DEFINE_float(
        "max_file_mb", 1024.0, "most megabytes of one file of an archive", 0.0, flag_values=values
    )
    flags.DEFINE_boolean(
        "force", False, "look again through archives that are unpacked", flag_values=values
    )


def main(args: Any) -> None:
    """Prepare, and say what there is."""
    from rich.console import Console

    console = Console()

    def say(message: str) -> None:
        console.print(message, markup=False, highlight=False, soft_wrap=True)

    data = Path(args.data)
    output = Path(args.output) if args.output else None
    if hub.is_hub_id(args.data):
        say(f"{args.data}: fetching from the hub")
        data = hub.fetch(args.data, output, subsets=args.subsets)
    limits = archives.Limits(
        file_bytes=int(args.max_file_mb * 2**20),
        total_bytes=None if args.max_unpacked_gb is None else int(args.max_unpacked_gb * 2**30),
    )
    done = prepare(
        data,
        output,
        subsets=args.subsets,
        splits=args.splits,
        limits=limits,
        workers=args.workers,
        cache_dir=args.cache_dir,
        force=args.force,
        say=say,
    )
    for name, count in done.unpacked.items():
        say(f"{name}: {count:,} files written")
    if args.tfds:
        from vlm2vec_jax.data import tfds

        for place, count in tfds.write(done.sources, args.tfds):
            say(f"{place}: {count:,} examples written")
    if done.missing:
        raise UserError(
            f"{done.missing:,} of {done.images:,} image files are missing below {done.image_root}, "
            f"for example {done.example}; python -m vlm2vec_jax.data.verify --data {data} lists "
            f"every row"
        )
    say(f"{done.images:,} image files are there; the image root is {done.image_root}")


if __name__ == "__main__":
    run(main, define)
