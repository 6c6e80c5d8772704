# SPDX-License-Identifier: Apache-2.0
"""Flags of a configuration: overrides with types, and mistakes in words."""

import subprocess
import sys

import pytest
from absl import flags as absl_flags

from vlm2vec_jax import flags
from vlm2vec_jax.config import Config, subset_names


def command(repository, capsys, *arguments: str) -> tuple[int, list[Config], str]:
    """Run an entry point that only reads its configuration; its code, what it read, stderr."""
    seen: list[Config] = []

    def main(args):
        seen.append(flags.experiment(args))

    argv = ["train", *(a.replace("configs/", f"{repository}/configs/") for a in arguments)]
    code = flags.call(main, flags.define_config, argv)
    return code, seen, capsys.readouterr().err


def test_overrides_are_typed(repository, capsys):
    code, seen, _ = command(
        repository,
        capsys,
        "--config=configs/mmeb.py:lora",
        "--config.optim.lr=3e-4",
        "--config.batch_size",
        "64",
        "--config.data.subsets=CIRR,NIGHTS",
        "--config.loss.mask_duplicate_targets",
        "--noconfig.checkpoint.resume",
        "--config.mesh.data=-1",
    )
    assert code == 0
    config = seen[0]
    assert config.adapter.type == "lora"
    assert config.optim.lr == 3e-4 and config.batch_size == 64
    assert subset_names(config) == ("CIRR", "NIGHTS")
    assert config.loss.mask_duplicate_targets is True and config.checkpoint.resume is False


def test_overrides_may_stand_before_the_file(repository, capsys):
    code, seen, _ = command(repository, capsys, "--config.steps=50", "--config", "configs/mini.py")
    assert code == 0 and seen[0].steps == 50


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config=configs/mini.py", "--config.optim.lrr=1"], "did you mean optim.lr"),
        (["--config=configs/mini.py", "--config.nothing.at_all=1"], "--config.nothing.at_all"),
        (
            ["--config=configs/mini.py", "--noconfig.checkpoint.resumed"],
            "did you mean checkpoint.res",
        ),
        (["--config=configs/mini.py", "--config.steps=many"], "config.steps"),
        (["--config=configs/mini.py", "--config.steps=1.5"], "config.steps"),
        (["--config=configs/mini.py", "--config.optim=3"], "optim"),
        (["--config=configs/mini.py", "--config.steps=-4"], "steps must be at least 1, not -4"),
        (["--config=configs/mini.py", "--stepz=4"], "stepz"),
        (["--config=configs/mini.py", "extra"], "arguments without a flag: extra"),
        (["--config=configs/mini.py:large"], "configs/mini.py has no variants"),
        (["--config=configs/absent.py"], "there is no config file"),
        (["--config.steps=4"], "config"),
        ([], "give a config file"),
    ],
)
def test_command_line_mistakes_are_messages(repository, capsys, arguments, said):
    code, seen, err = command(repository, capsys, *arguments)
    assert code == flags.USER_ERROR and not seen
    assert said in err
    assert "Traceback" not in err


def test_a_missing_required_flag_is_named(capsys):
    def define(values):
        absl_flags.DEFINE_string("model", None, "a folder", required=True, flag_values=values)

    assert flags.call(lambda args: None, define, ["embed"]) == flags.USER_ERROR
    assert "--model must be given" in capsys.readouterr().err
    assert flags.call(lambda args: None, define, ["embed", "--model=x"]) == 0


def test_help_lists_the_flags(capsys):
    assert flags.call(lambda args: None, flags.define_config, ["train", "--help"]) == 0
    assert "--config" in capsys.readouterr().out


def test_a_full_disk_is_a_message_and_a_defect_is_not(capsys):
    def full(args):
        raise OSError(28, "No space left on device", "out/model")

    def defect(args):
        raise IndexError("a defect")

    assert flags.call(full, lambda values: None, ["x"]) == flags.USER_ERROR
    assert "out/model (No space left on device)" in capsys.readouterr().err
    with pytest.raises(IndexError):
        flags.call(defect, lambda values: None, ["x"])


def test_run_exits_with_two_and_no_traceback(repository, tmp_path):
    script = tmp_path / "entry.py"
    script.write_text(
        "from vlm2vec_jax import flags\n"
        "def main(args):\n"
        "    flags.experiment(args)\n"
        "if __name__ == '__main__':\n"
        "    flags.run(main, flags.define_config)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), "--config", "configs/mini.py", "--config.steps=0"],
        cwd=repository,
        env={"PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "steps must be at least 1" in done.stderr and "Traceback" not in done.stderr
