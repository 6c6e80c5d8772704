# SPDX-License-Identifier: Apache-2.0
"""Archives of images, unpacked as if a stranger had made them.

Names are judged before a byte is written: absolute paths, `..`, drive letters, links, devices,
encrypted members and two members of one name refuse the whole archive, and so do sizes of a bomb.
A member goes to a temporary file below the target and is renamed when it is whole, with its
checksum; a member that is there with its size is not unpacked again, so an interrupted run goes on.
Nothing of an archive is executed, and no permission, owner or link of it is taken over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import lzma
import os
import shutil
import stat
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from vlm2vec_jax.data.paths import unsafe_path
from vlm2vec_jax.errors import UserError, raise_problems

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
TEMPORARY = ".unpacking"
"""Folder below the target that members are written to before they get their names."""

_CHUNK = 1 << 20
_HARMLESS = 64 << 20
_DAMAGE = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, RuntimeError,
    ValueError,
)  # fmt: skip
_LITTER = ("__MACOSX/", ".DS_Store")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What an archive of images stays below, unless it is a bomb.

    Attributes:
      file_bytes: bytes of one member.
      total_bytes: bytes of all members; None for `ratio`.
      ratio: unpacked bytes of all members per byte of the archive, beyond the first 64 MiB: images
        hardly compress.
      files: members.
    """

    file_bytes: int = 1 << 30
    total_bytes: int | None = None
    ratio: float = 100.0
    files: int = 20_000_000


@dataclasses.dataclass(frozen=True)
class Member:
    """A regular file of an archive."""

    name: str
    size: int
    handle: Any = dataclasses.field(compare=False, repr=False, default=None)


def is_archive(path: Path) -> bool:
    """Whether a file is called like an archive that can be unpacked."""
    return path.name.lower().endswith(SUFFIXES)


def list_members(path: Path, limits: Limits = Limits()) -> list[Member]:  # noqa: B008 (frozen)
    """The regular files of an archive, after a look at everything in it.

    Raises:
      UserError: an unreadable archive, or one message with everything that may not be unpacked.
    """
    members, problems = [], []
    names: dict[str, str] = {}
    try:
        for member, problem in _scan(path):
            if problem is None and member is not None:
                name = os.path.normpath(member.name)
                if name in names:
                    problem = f"{member.name!r}: the name comes twice"
                elif member.size > limits.file_bytes:
                    problem = (
                        f"{member.name!r}: {member.size:,} bytes are more than the limit of "
                        f"{limits.file_bytes:,} for a file"
                    )
                names[name] = member.name
            if problem:
                problems.append(problem)
            elif member is not None:
                members.append(member)
            if len(members) > limits.files:
                raise UserError(f"{path}: more than {limits.files:,} files in it")
    except UserError:
        raise
    except (*_DAMAGE, OSError) as error:
        raise UserError(f"{path}: not a readable archive ({error}); download it again") from None
    total = sum(m.size for m in members)
    most = limits.total_bytes
    if most is None:
        most = max(limits.ratio * path.stat().st_size, _HARMLESS)
    if total > most:
        problems.append(
            f"{total:,} bytes unpacked are more than the limit of {int(most):,} "
            f"for an archive of {path.stat().st_size:,} bytes"
        )
    raise_problems(
        f"{path}: refused, nothing was unpacked",
        problems,
        advice="An archive like this was made by mistake or in malice; fetch it from its source.",
    )
    return members


def _scan(path: Path) -> Iterator[tuple[Member | None, str | None]]:
    """Members of an archive, or what is wrong with them; (None, None) for a folder."""
    if path.name.lower().endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                # `filename` is cut at a NUL and has its separators turned: judge what is written.
                name = info.orig_filename
                kind = stat.S_IFMT(info.external_attr >> 16)
                problem = _refuse(name)
                if problem is None and kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                    problem = f"{name!r}: a {_KINDS.get(kind, 'special file')}, not a file"
                if problem is None and info.flag_bits & 1:
                    problem = f"{name!r}: encrypted"
                folder = info.is_dir() or kind == stat.S_IFDIR
                member = None if folder else Member(name, info.file_size, info)
                yield member, problem
        return
    with tarfile.open(path) as archive:
        for info in archive:
            problem = _refuse(info.name)
            if problem is None and not (info.isreg() or info.isdir()):
                what = "link" if info.issym() or info.islnk() else "special file"
                problem = f"{info.name!r}: a {what}, not a file"
            yield (Member(info.name, info.size, info) if info.isreg() else None), problem


_KINDS = {stat.S_IFLNK: "symbolic link", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}


def _refuse(name: str) -> str | None:
    reason = unsafe_path(name)
    if reason is None and "\\" in name:
        reason = "a backslash in the name"
    if reason is None and os.path.normpath(name) == "." and name.rstrip("/") not in ("", "."):
        reason = "a name of nothing but dots"
    if reason is None:
        return None
    return f"{name!r}: {reason.replace('image path', 'path').replace('the image root', 'it')}"


def is_litter(name: str) -> bool:
    """Whether a member is something that an operating system put into the archive."""
    return name.startswith(_LITTER[0]) or name.endswith(_LITTER[1])


def unpack(
    path: Path,
    members: Sequence[Member],
    target: Path,
    place: Callable[[str], str | None],
    *,
    workers: int = 4,
    done: Callable[[int], None] = lambda count: None,
) -> int:
    """Write members below a folder; whatever is there with its size is left alone.

    Args:
      path: the archive.
      members: what `list_members` returned.
      target: the folder; made if missing.
      place: where below the target a member goes by its name, None to leave it out.
      workers: threads that unpack a zip file; a tar file is read in order by one.
      done: called with the number of members behind us, from several threads.

    Returns:
      How many members were written.

    Raises:
      UserError: a damaged member, a full disk, or a link below the target that leads out of it.
    """
    target.mkdir(parents=True, exist_ok=True)
    wanted: list[tuple[Member, Path]] = []
    for member in members:
        below = place(member.name)
        if below is None:
            continue
        if unsafe_path(below):
            raise UserError(f"{path}: {member.name!r} would be written outside of {target}")
        file = target / below
        if not (file.is_file() and not file.is_symlink() and file.stat().st_size == member.size):
            wanted.append((member, file))
    needed, free = sum(m.size for m, _ in wanted), shutil.disk_usage(target).free
    if needed > free:
        raise UserError(
            f"{path}: {needed:,} bytes to write, but only {free:,} are free in {target}"
        )
    writer = _Writer(path, target)
    done(len(members) - len(wanted))
    try:
        if path.name.lower().endswith(".zip"):
            with zipfile.ZipFile(path) as archive, ThreadPoolExecutor(max(1, workers)) as pool:
                jobs = pool.map(
                    lambda job: writer.write(lambda: archive.open(job[0].handle), *job), wanted
                )
                for count, _ in enumerate(jobs, 1):
                    done(len(members) - len(wanted) + count)
        else:
            _unpack_tar(path, wanted, writer)
    finally:
        writer.close()
    return len(wanted)


def _unpack_tar(path: Path, wanted: Sequence[tuple[Member, Path]], writer: _Writer) -> None:
    files = {member.name: (member, file) for member, file in wanted}
    with tarfile.open(path) as archive:
        for info in archive:  # in order: a compressed tar file cannot be sought in
            if info.isreg() and info.name in files:
                writer.write(lambda info=info: archive.extractfile(info), *files[info.name])


class _Writer:
    """Writes members to temporary files and gives them their names when they are whole."""

    def __init__(self, path: Path, target: Path):
        self.path, self.target = path, target
        self.real = os.path.realpath(target)
        self.temporary = target / TEMPORARY
        self.temporary.mkdir(exist_ok=True)
        self._folders: set[Path] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def write(self, opened: Callable[[], Any], member: Member, file: Path) -> None:
        if self._stop.is_set():
            return
        part = self.temporary / f"{os.getpid()}-{threading.get_ident()}"
        try:
            self._make_folder(file.parent)
            with opened() as stream, open(part, "wb") as sink:
                self._copy(stream, sink, member)
            os.replace(part, file)
        except UserError:
            raise
        except _DAMAGE as error:
            self._stop.set()
            raise UserError(
                f"{self.path}: {member.name!r} is damaged ({error}); download the archive again"
            ) from None
        except OSError as error:
            self._stop.set()
            raise UserError(f"{file}: cannot be written ({error.strerror or error})") from None
        finally:
            part.unlink(missing_ok=True)

    def _copy(self, stream: IO[bytes], sink: IO[bytes], member: Member) -> None:
        count = 0
        while chunk := stream.read(_CHUNK):
            count += len(chunk)
            if count > member.size:  # the head of the archive lied
                raise zipfile.BadZipFile(f"more than the {member.size:,} bytes announced")
            sink.write(chunk)
        if count != member.size:
            raise zipfile.BadZipFile(f"{count:,} bytes instead of {member.size:,}")

    def _make_folder(self, folder: Path) -> None:
        """Make a member's folder, which no link may lead out of the target."""
        with self._lock:
            if folder in self._folders:
                return
            real = os.path.realpath(folder)
            if real != self.real and not real.startswith(self.real.rstrip(os.sep) + os.sep):
                self._stop.set()
                raise UserError(f"{folder}: a link leads out of {self.target}; remove it")
            folder.mkdir(parents=True, exist_ok=True)
            self._folders.add(folder)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.temporary.rmdir()
