# SPDX-License-Identifier: Apache-2.0
"""Compiled programs: kept on disk from one run to the next, and counted while a run goes.

jax can keep what it compiles in a folder (its persistent compilation cache), so that a run of the
same shapes on the same kind of machine starts in seconds instead of minutes. Entry points turn
that on through `flags.use_compilation_cache`; nothing else does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import stat
import tempfile
from pathlib import Path

import jax
import jax.monitoring
import platformdirs

AUTO, OFF = "auto", "off"
MAX_BYTES = 10 << 30
"""Beyond it the programs that were not used for longest are dropped."""
_MIN_SECONDS = 0.5
"""Programs that take less to compile are not worth a file."""
_COMPILED = "/jax/core/compile/backend_compile_duration"
_LOADED = "/jax/compilation_cache/cache_hits"


def default_folder() -> Path:
    """Where programs are kept unless the user says otherwise: in the platform's cache folder."""
    return Path(platformdirs.user_cache_dir("vlm2vec_jax", appauthor=False)) / "programs"


def keep_programs(where: str) -> str | None:
    """Keep compiled programs; call before anything is compiled.

    A folder that jax was told already (JAX_COMPILATION_CACHE_DIR) stays, and so does jax's own
    switch (JAX_ENABLE_COMPILATION_CACHE=0).

    Args:
      where: a folder, `auto` for `default_folder`, `off` to keep nothing.

    Returns:
      None, or why nothing is kept, in words: that is never a reason to stop.
    """
    if where == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    if not jax.config.jax_enable_compilation_cache:
        return None
    if where == AUTO and jax.config.jax_compilation_cache_dir:
        return None
    folder = default_folder() if where == AUTO else Path(where).expanduser()
    problem = _problem(folder)
    if problem:
        jax.config.update("jax_enable_compilation_cache", False)
        return (
            f"compiled programs are not kept, so the next start will take as long again: "
            f"{folder}: {problem}. --compilation_cache names another folder, or says {OFF}"
        )
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return None


def _problem(folder: Path) -> str:
    """Why a folder cannot be used; made if missing, for this user alone."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
        found = folder.stat()
    except (OSError, RuntimeError) as error:
        return getattr(error, "strerror", None) or str(error)
    if hasattr(os, "getuid"):
        # What lies there is run: it must be this user's own.
        if found.st_uid != os.getuid():
            return "it belongs to another user, who could put programs there"
        if stat.S_IMODE(found.st_mode) & (stat.S_IWGRP | stat.S_IWOTH):
            return "others may write to it, and so put programs there (chmod go-w mends it)"
    return ""


@dataclasses.dataclass
class Programs:
    """Counts the programs that jax makes in a `with` block, in all threads.

    Attributes:
      only: count those of this function alone; "" for all.
      count: how many, compiled or loaded.
      seconds: that making them took.
      loaded: how many of all came from the persistent cache.
    """

    only: str = ""
    count: int = 0
    seconds: float = 0.0
    loaded: int = 0

    def __enter__(self) -> Programs:
        jax.monitoring.register_event_duration_secs_listener(self._made)
        jax.monitoring.register_event_listener(self._event)
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(ValueError, AssertionError):  # somebody cleared all listeners
            jax.monitoring.unregister_event_duration_listener(self._made)
            jax.monitoring.unregister_event_listener(self._event)

    def _made(self, event: str, duration_secs: float, **about: str | int) -> None:
        if event == _COMPILED and (not self.only or self.only in str(about.get("fun_name", ""))):
            self.count += 1
            self.seconds += duration_secs

    def _event(self, event: str, **about: str | int) -> None:
        if event == _LOADED:
            self.loaded += 1
