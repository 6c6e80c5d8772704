# SPDX-License-Identifier: Apache-2.0
"""How entry points read the command line, and how they fail.

An entry point defines its flags in one function and does its work in another:

    def define(values):
        flags.DEFINE_string("model", None, "a model folder", required=True, flag_values=values)

    def main(args):
        print(args.model)

    if __name__ == "__main__":
        run(main, define)

A mistake of the user's (`UserError`, a wrong flag, a full disk) becomes a message on stderr and
exit code 2, never a traceback; anything else is a defect and keeps its traceback. Flags live in an
object of their own and not in absl's global one, so `call` can be used many times in a process.
"""

import difflib
import errno
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import flags
from ml_collections import config_flags

from vlm2vec_jax import config as config_lib
from vlm2vec_jax.errors import UserError, raise_problems
from vlm2vec_jax.options import OPTIONS

USER_ERROR = 2
"""Exit code for everything that the user can mend."""

INTERRUPTED = 75
"""Exit code after a signal that led to a save: start me again (EX_TEMPFAIL of sysexits.h)."""

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)

Define = Callable[[flags.FlagValues], Any]
Main = Callable[[Any], int | None]


def run(main: Main, define: Define, argv: Sequence[str] | None = None) -> NoReturn:
    """Parse the flags, run `main`, and leave the process with its exit code.

    Args:
      main: takes the parsed flags as attributes; returns None or an exit code.
      define: adds flags to the `absl.flags.FlagValues` that it is given.
      argv: the command line with the program's name in front; `sys.argv` if None.
    """
    sys.exit(call(main, define, argv))


def call(main: Main, define: Define, argv: Sequence[str] | None = None) -> int:
    """`run` that returns the exit code: 0, what `main` returns, 2 for a user's mistake, 130."""
    argv = list(sys.argv if argv is None else argv)
    # Grain's workers look into absl's global flags and refuse to start while those are unparsed.
    flags.FLAGS.mark_as_parsed()
    try:
        values = flags.FlagValues()
        if any(a in ("-h", "--help", "--helpfull") for a in argv[1:]):
            define(values)
            print(_help(main, values))
            return 0
        _parse(values, define, argv)
        return main(values) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        where = f": {error.filename}" if error.filename else ""
        print(f"error: cannot write or read{where} ({error.strerror})", file=sys.stderr)
        return USER_ERROR


def take_arguments(values: flags.FlagValues) -> None:
    """Let the command line have arguments without a flag; `main` finds them in `arguments`.

    Args:
      values: what `define` was given.
    """
    object.__setattr__(values, "arguments", [])


def define_config(values: flags.FlagValues, argv: Sequence[str] | None = None) -> None:
    """Add `--config FILE.py[:variant]` and its overrides `--config.group.field=value`.

    Args:
      values: what `define` was given.
      argv: the command line that holds the overrides; the one given to `run` if None.
    """
    argv = getattr(values, "command_line", None) if argv is None else argv
    config_flags.DEFINE_config_file(
        "config",
        None,
        "a config file, with a variant behind a colon; fields are set by --config.FIELD=VALUE",
        flag_values=values,
        sys_argv=list(sys.argv if argv is None else argv),
    )


def define_processor_options(values: flags.FlagValues) -> None:
    """Add a flag per processor option, none of which has a default."""
    for name, option in OPTIONS.items():
        words = f"{option.words}; the model's own by default"
        if option.choices:
            flags.DEFINE_enum(name, None, option.choices, words, flag_values=values)
        elif option.text:
            flags.DEFINE_string(name, None, words, flag_values=values)
        else:
            flags.DEFINE_integer(name, None, words, lower_bound=1, flag_values=values)


def define_quantize(values: flags.FlagValues) -> None:
    """Add the flag that makes weights narrow."""
    flags.DEFINE_enum(
        "quantize",
        None,
        ["int8", "fp8"],
        "keep the weights of linear layers in 8 bits: half the memory, slightly other embeddings",
        flag_values=values,
    )


def processor_options(args: Any) -> dict[str, Any]:
    """The processor options that were given on the command line."""
    return {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}


def define_compilation_cache(values: flags.FlagValues) -> None:
    """Add the flag that says where compiled programs are kept."""
    flags.DEFINE_string(
        "compilation_cache",
        "auto",
        "folder that keeps compiled programs for the next start; auto: the user's cache folder, "
        "or what JAX_COMPILATION_CACHE_DIR says; off: keep none",
        flag_values=values,
    )


def use_compilation_cache(args: Any) -> None:
    """Keep compiled programs as the flag says; call before anything is compiled.

    Args:
      args: the parsed flags of an entry point that called `define_compilation_cache`.
    """
    from vlm2vec_jax.compilation import keep_programs

    problem = keep_programs(args.compilation_cache)
    if problem:
        print(f"warning: {problem}", file=sys.stderr)


def experiment(args: Any) -> config_lib.Config:
    """The checked configuration behind `--config`.

    Args:
      args: the parsed flags of an entry point that called `define_config`.

    Raises:
      UserError: if there is none, or it does not pass `config.check`.
    """
    if args.config is None:
        raise UserError("give a config file, for example --config configs/mini.py")
    return config_lib.check(args.config)


def define_processes(values: flags.FlagValues) -> None:
    """Add the flags of a run of several processes."""
    text, number, switch = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_boolean
    text("coordinator", None, "host:port of process 0, for a run of several processes; "
         "goes with num_processes and process_id", flag_values=values)  # fmt: skip
    number("num_processes", None, "how many processes take part", flag_values=values)
    number("process_id", None, "number of this process, from 0", flag_values=values)
    switch("distributed", False, "take these three from the surroundings: SLURM, a TPU pod, "
           "Open MPI, Kubernetes", flag_values=values)  # fmt: skip
    number("start_timeout", 300, "seconds to wait for the other processes", lower_bound=1,
           flag_values=values)  # fmt: skip


def join_processes(args: Any) -> Any:
    """Come together with the other processes of the run, before any device is used.

    Args:
      args: the parsed flags of an entry point that called `define_processes`.

    Returns:
      `parallel.peers.Peers`; a single one if no flag asks for more.

    Raises:
      UserError: for flags that contradict, or naming who did not come.
    """
    from vlm2vec_jax.parallel import cluster, peers

    place = cluster.place(
        args.coordinator,
        args.num_processes,
        args.process_id,
        detect=args.distributed,
        environment=os.environ,
        timeout_s=args.start_timeout,
    )
    return peers.join(
        place,
        timeout_s=args.start_timeout,
        report=lambda message: print(message, file=sys.stderr, flush=True),
    )


def _parse(values: flags.FlagValues, define: Define, argv: list[str]) -> None:
    """Parse `argv` into `values`; every way in which that fails becomes a `UserError`."""
    argv = _config_first(argv)
    object.__setattr__(values, "command_line", argv)  # FlagValues takes plain sets for flags
    define(values)
    file = _config_path(argv) if "config" in values else None
    if file is not None and not os.path.isfile(file):
        raise UserError(f"there is no config file {file}")
    try:
        rest = values(argv)
    except KeyError:
        _explain_overrides(argv)
        raise
    except flags.Error as error:
        raise UserError(_in_words(error)) from error
    if hasattr(values, "arguments"):
        object.__setattr__(values, "arguments", rest[1:])
    elif len(rest) > 1:
        raise UserError(f"arguments without a flag: {' '.join(rest[1:])}")


def _config_first(argv: list[str]) -> list[str]:
    """The same arguments with `--config FILE` in front, because overrides need the file."""
    for i, a in enumerate(argv[1:], 1):
        name = a.lstrip("-")
        if a.startswith("-") and name == "config" and i + 1 < len(argv):
            return [argv[0], a, argv[i + 1], *argv[1:i], *argv[i + 2 :]]
        if a.startswith("-") and name.startswith("config="):
            return [argv[0], a, *argv[1:i], *argv[i + 1 :]]
    return argv


def _config_path(argv: list[str]) -> str | None:
    """The file behind `--config`, which `_config_first` put in front; None if there is none."""
    value = None
    if len(argv) > 1 and argv[1].lstrip("-").startswith("config="):
        value = argv[1].split("=", 1)[1]
    elif len(argv) > 2 and argv[1].lstrip("-") == "config":
        value = argv[2]
    return None if value is None else value.split(":", 1)[0]


def _explain_overrides(argv: list[str]) -> None:
    """Name the overrides of fields that do not exist, each with the nearest that do."""
    known = list(config_lib.field_types())
    problems = []
    for a in argv[1:]:
        name = a.lstrip("-").split("=", 1)[0].removeprefix("no")  # --noconfig.FLAG sets False
        if not a.startswith("-") or not name.startswith("config."):
            continue
        path = name.removeprefix("config.")
        if path not in known:
            near = difflib.get_close_matches(path, known, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            problems.append(f"--config.{path}: there is no such field{hint}")
    raise_problems("unknown fields on the command line", problems)


def _in_words(error: flags.Error) -> str:
    """What went wrong: a config file's own `UserError` if one lies underneath, or absl's words."""
    found, seen = None, error
    while seen is not None:
        if isinstance(seen, UserError):
            found = str(seen)
        seen = seen.__cause__ or seen.__context__
    missing = re.findall(r"Flag (--\S+) must have a value other than None", str(error))
    one_of = re.findall(r"Exactly one of \(([^)]*)\) must have a value", str(error))
    said = [f"{', '.join(missing)} must be given"] if missing else []
    flagged = [", ".join(f"--{name.strip()}" for name in names.split(",")) for names in one_of]
    said += [f"give exactly one of {names}" for names in flagged]
    return found or "; ".join(said) or str(error)


def _help(main: Main, values: flags.FlagValues) -> str:
    doc = inspect.getdoc(sys.modules[main.__module__]) or ""
    return f"{doc}\n\nFlags:\n{values.get_help(prefix='  ')}"
