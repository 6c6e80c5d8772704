# SPDX-License-Identifier: Apache-2.0
"""The programs in `examples/`, run as a user runs them, on a model of a few thousand parameters."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from small_models import label, picture, write_model, write_train

pytestmark = pytest.mark.usefixtures("compiled_quickly")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("examples")
    write_model(write_train(root / "data"), root / "base")
    (root / "photos" / "more").mkdir(parents=True)
    for k in range(5):
        picture(k).save(root / "photos" / ("more" if k % 2 else "") / f"{k}.png")
    # Every batch has as many pictures and texts of a length: the step is compiled for one shape.
    pairs = [
        {
            "query": {"images": [f"photos/{'more/' if k % 2 else ''}{k}.png"]},
            "positive": label(k),
        }
        for k in (n % 5 for n in range(40))
    ]
    (root / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return root


def run(name: str, *argv) -> int:
    path = Path(__file__).parent.parent / "examples" / name
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, argv)])
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as error:
            return error.code or 0  # type: ignore[return-value]
    return 0


def test_photos_are_found(folder, capsys):
    given = ("--model", folder / "base", "--photos", folder / "photos", "--dtype", "float32")
    for _ in range(2):  # embedded, then kept
        assert run("search_photos.py", *given, "--query", folder / "photos" / "more" / "3.png") == 0
        best = capsys.readouterr().out.splitlines()[0].split()
        assert best == ["1.0000", str(folder / "photos" / "more" / "3.png")]
    assert run("search_photos.py", *given, "--query", "something red", "--top_k", 2) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.slow
def test_fine_tuning_then_converting(folder, capsys):
    output = folder / "run"
    given = ("--model", folder / "base", "--pairs", folder / "pairs.jsonl", "--output", output)
    more = ("--steps", 4, "--batch_size", 8, "--dtype", "float32")
    assert run("finetune_pairs.py", *given, *more) == 0
    assert "right targets among 4: " in capsys.readouterr().out
    (folder / "inputs.jsonl").write_text(json.dumps({"text": "a text"}) + "\n")
    shutil.rmtree(folder / "exports", ignore_errors=True)
    assert run("convert_and_compare.py", "--model", output, "--output", folder / "exports",
               "--input", folder / "inputs.jsonl") == 0  # fmt: skip
    assert {p.name for p in (folder / "exports").iterdir()} == {"peft", "merged"}
