# SPDX-License-Identifier: Apache-2.0
"""Who may import whom: read from the syntax tree of every module, so nothing is executed.

The rooms are host side (no jax: `data/`, processors, inputs, packing, planning, configuration),
device side (`nn`, `losses`, `parallel`: only jax, flax, numpy), `weights` (knows no model),
`models` (a backbone knows no other but `shared`, no data and no training) and entry points,
which alone read flags and the environment.
"""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "vlm2vec_jax"
NAME = PACKAGE.name

ENTRY_POINTS = {"train", "evaluate", "embed", "export", "compile", "replay", "search"}
MAINS = ENTRY_POINTS | {"flags", "data.mini_mmeb", "models.phi3v.mini", "evaluation.report"}
MAINS |= {"models.qwen2_vl.mini", "models.shared.mini"}
MAINS |= {"data.prepare", "data.verify", "data.membership"}
MAINS |= {"weights.compare", "weights.from_bin"}
MAINS |= {f"evaluation.{name}" for name in ("command", "merge", "flickr", "inputs", "leaderboard")}
"""Modules that may read flags and the environment: the entry points and small generators."""

READS_PICKLES = "weights.from_bin"
"""Converts torch's pickles with torch itself, where it is installed, imported in a function."""
COMPARES = "weights.compare"
"""A command that loads whole models, though it is about weights."""

HOST_FILES = {
    "errors",
    "inputs",
    "images",
    "packing",
    "planning",
    "config",
    "config_check",
    "config_groups",
    "options",
}
QWEN = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl"}
FAMILIES = {"qwen_vl": QWEN, "shared": {"phi3v", "llava_next", "qwen_vl", *QWEN}}
"""A folder of shared parts -> the folders that may import it; it imports none of them."""
DEVICE_SIDE = {f"embedding.{name}" for name in ("loading", "merging", "team", "ray_engine")}
"""What in the otherwise host-side room `embedding` loads models, or talks through devices."""
SHOWN = ("evaluation.store", "evaluation.html")
"""Parts of `evaluation` that know nothing of a benchmark: fingerprints, pages."""
TOKENIZER = "models.tokenizer"
MAKES_TOKENIZER = {"models.phi3v.mini", "models.phi3v.mini_tokenizer", "models.qwen2_vl.mini"}
"""Train the small models' tokenizers, so they may use `tokenizers` (inside a function, too)."""
FORBIDDEN = {"torch", "torchvision", "tensorflow", "pickle", "dill", "cloudpickle", "joblib"}
DEVICE_LIBRARIES = {"jax", "jaxlib", "flax", "optax", "orbax", "chex"}
COMMAND_LINE = {"absl", "argparse", "ml_collections", "click"}
NETWORK = {"requests", "urllib", "http", "socket", "huggingface_hub"}


@dataclasses.dataclass(frozen=True)
class Import:
    """One imported module: its full name, the line, and whether loading the file loads it."""

    name: str
    line: int
    eager: bool


def type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def imports_of(source: str, package: str) -> list[Import]:
    """Every import of a file; those under TYPE_CHECKING do not happen and are left out.

    `from a import b` is listed as both `a` and `a.b`, since b may be a module.
    """
    found: list[Import] = []

    def visit(node: ast.AST, eager: bool):
        if type_checking(node):
            for child in node.orelse:
                visit(child, eager)
            return
        if isinstance(node, ast.Import):
            found.extend(Import(a.name, node.lineno, eager) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                parent = ".".join(parts[: len(parts) - node.level + 1])
                base = f"{parent}.{base}" if base else parent
            found.append(Import(base, node.lineno, eager))
            found.extend(Import(f"{base}.{a.name}", node.lineno, eager) for a in node.names)
        inside = eager and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(source), True)
    return found


@dataclasses.dataclass(frozen=True)
class Module:
    """A file of the package: its name below the package ("nn.linear"), text and imports."""

    name: str
    source: str
    imports: tuple[Import, ...]

    @property
    def room(self) -> str:
        return self.name.split(".")[0]

    @property
    def host(self) -> bool:
        return (
            self.room == "data"
            or self.name in HOST_FILES
            or (self.room == "embedding" and self.name not in DEVICE_SIDE)
            or self.name.split(".")[-1] == "processor"
        )

    def internal(self) -> list[Import]:
        """Imports of this package, with names below it."""
        return [
            dataclasses.replace(i, name=i.name.removeprefix(f"{NAME}."))
            for i in self.imports
            if i.name.startswith(f"{NAME}.")
        ]

    def external(self) -> list[Import]:
        return [i for i in self.imports if top(i.name) != NAME]


def top(name: str) -> str:
    return name.split(".")[0]


def module(path: Path, root: Path = PACKAGE) -> Module:
    parts = path.relative_to(root).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    parts = parts[:-1] if is_package else parts
    package = ".".join((NAME, *(parts if is_package else parts[:-1])))
    source = path.read_text()
    return Module(".".join(parts), source, tuple(imports_of(source, package)))


ROLL_CALL = "parallel.rollcall"
"""Where the processes of a run meet over TCP, before jax can bring them together."""
FETCHES = {"models.folders", "data.hub", "evaluation.endpoint"}
"""Turn a hub id into a folder, ask a server; called for what a user named, never on their own."""
STORED = ("training.checkpoint", "training.fingerprint")

MODULES = {m.name: m for m in (module(p) for p in sorted(PACKAGE.rglob("*.py")))}


def violations(m: Module) -> list[str]:
    """What a module imports against the table, in words; closures are looked at elsewhere."""
    found = []

    def say(i: Import, why: str):
        found.append(f"{m.name or NAME}:{i.line} imports {i.name}: {why}")

    for i in m.external():
        name = top(i.name)
        if name in FORBIDDEN and not (name == "torch" and m.name == READS_PICKLES and not i.eager):
            say(i, "nowhere in this package")
        if name in DEVICE_LIBRARIES and m.host:
            say(i, "host-side modules know no jax")
        makes = name == "tokenizers" and m.name in MAKES_TOKENIZER
        if name in ("transformers", "tokenizers") and (
            i.eager or not (makes or m.name == TOKENIZER)
        ):
            say(i, f"only {TOKENIZER} does, and inside a function")
        if name in COMMAND_LINE and m.name not in MAINS:
            say(i, "only entry points read flags")
        if name in NETWORK and m.name not in MAINS | FETCHES | {ROLL_CALL}:
            say(i, "only entry points reach the network")
        allowed = {"jax", "flax", "numpy", "__future__", *sys.stdlib_module_names}
        if m.room in ("nn", "losses", "parallel") and name not in allowed:
            say(i, "nn, losses and parallel know only jax, flax and numpy")
    for i in m.internal():
        room = top(i.name)
        if room in ENTRY_POINTS and m.room not in ENTRY_POINTS and m.room != room:
            say(i, "entry points are imported by nobody")
        if m.room in ("nn", "losses", "parallel") and room not in (
            *("nn", "losses", "parallel"),
            *("errors", "inputs", "packing", "config"),
        ):
            say(i, "these rooms stand below everything else")
        above = ("models", "data", "training", "evaluation", "embedder", "embedding")
        if m.room == "weights" and room in above and m.name != COMPARES:
            say(i, "weights are handed their tables")
        if m.room == "models":
            if room in ("data", "training", "evaluation", "embedder") and m.name not in MAINS:
                say(i, "a backbone knows no data and no training")
            if other_backbone(m.name, i.name):
                say(i, "a backbone never imports another")
        stored = i.name.startswith(STORED)  # a training output is a model folder, too
        shown = m.room == "embedding" and i.name.startswith(SHOWN)
        embeds = m.room in ("embedder", "embedding")
        if embeds and room in ("training", "evaluation", "data") and not (stored or shown):
            say(i, "the embedder stands below training and evaluation")
    return found


KNOWN = {p.parent.name for p in PACKAGE.glob("models/*/__init__.py")} | {"other"} | set(FAMILIES)
KNOWN = KNOWN.union(*FAMILIES.values())
"""Folders under `models/`, and names for the tests of the table itself."""


def other_backbone(importer: str, imported: str) -> bool:
    mine, theirs = importer.split("."), imported.split(".")
    if theirs[0] != "models" or len(theirs) < 2 or theirs[1] not in KNOWN:
        return False
    if len(mine) > 1 and mine[1] in FAMILIES.get(theirs[1], ()):
        return False
    return len(mine) < 2 or mine[1] != theirs[1]


def loads(name: str, modules: dict[str, Module]) -> dict[str, str]:
    """Every module that loading `name` loads, with the module that asks for it."""
    reached: dict[str, str] = {}
    pending = [(name, "")]
    while pending:
        current, asker = pending.pop()
        if current in reached or current not in modules:
            continue
        reached[current] = asker
        parts = current.split(".")
        pending += [(".".join(parts[:k]), current) for k in range(len(parts))]
        pending += [(i.name, current) for i in modules[current].internal() if i.eager]
    return reached


@pytest.mark.parametrize("name", sorted(MODULES))
def test_module_keeps_to_the_table(name):
    assert not violations(MODULES[name])


@pytest.mark.parametrize("name", sorted(n for n, m in MODULES.items() if m.host))
def test_host_side_modules_load_no_jax_through_others(name):
    found = [
        f"{other} (asked for by {asker}) imports {i.name}"
        for other, asker in loads(name, MODULES).items()
        for i in MODULES[other].external()
        if i.eager and top(i.name) in DEVICE_LIBRARIES
    ]
    assert not found


def code_violations(m: Module) -> list[str]:
    """Environment, command line, pickled arrays and remote code, seen in the syntax tree."""
    found = []
    for node in ast.walk(ast.parse(m.source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            text = f"{node.value.id}.{node.attr}"
            if text in ("os.environ", "os.getenv", "sys.argv") and m.name not in MAINS:
                found.append(f"{m.name}:{node.lineno} reads {text}")
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code"):
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                found.append(f"{m.name}:{node.value.lineno} passes {node.arg}")
    return found


@pytest.mark.parametrize("name", sorted(MODULES))
def test_module_reads_no_environment_and_runs_no_foreign_code(name):
    assert not code_violations(MODULES[name])


def test_the_rooms_are_there():
    # The tests above are vacuous for a room that is misnamed.
    for room in ("nn", "losses", "parallel", "models", "weights", "data", "inputs", "config"):
        assert room in MODULES, room
    assert HOST_FILES <= set(MODULES)


@pytest.mark.parametrize(
    ("name", "source", "said"),
    [
        ("embedder", "import torch.nn", "nowhere"),
        ("weights.from_bin", "import torch", "nowhere"),
        ("weights.load", "def f():\n    import torch", "nowhere"),
        ("weights.from_bin", "from vlm2vec_jax.models import loading", "handed their tables"),
        ("training.state", "def f():\n    import pickle", "nowhere"),
        ("data.mmeb", "def f():\n    from jax import numpy", "no jax"),
        ("models.phi3v.processor", "import jax.numpy as jnp", "no jax"),
        ("models.tokenizer", "import transformers", "inside a function"),
        ("models.phi3v.processor", "def f():\n    import tokenizers", "inside a function"),
        ("models.phi3v.mini", "import tokenizers", "inside a function"),
        ("models.phi3v.mini", "def f():\n    import transformers", "inside a function"),
        ("training.loop", "from absl import flags", "only entry points"),
        ("nn.linear", "import optax", "only jax, flax and numpy"),
        ("nn.linear", "from vlm2vec_jax import models", "below everything"),
        ("losses.ring", "from vlm2vec_jax.training import state", "below everything"),
        ("weights.load", "from vlm2vec_jax.models import phi3v", "handed their tables"),
        ("weights.load", "from ..models.phi3v import weights", "handed their tables"),
        ("models.phi3v.model", "from vlm2vec_jax.models.other import clip", "another"),
        ("models.base", "from vlm2vec_jax.models.other import clip", "another"),
        ("models.phi3v.model", "from vlm2vec_jax.models.qwen_vl import text", "another"),
        ("models.qwen_vl.text", "from vlm2vec_jax.models.qwen2_vl import model", "another"),
        ("models.qwen2_vl.model", "from vlm2vec_jax.models.qwen3_vl import model", "another"),
        ("models.phi3v.model", "from vlm2vec_jax.training import step", "no training"),
        ("training.loop", "from vlm2vec_jax.train import main", "by nobody"),
        ("embedder", "import vlm2vec_jax.evaluation.run", "below training"),
    ],
)
def test_the_table_can_say_no(name, source, said):
    package = f"{NAME}.{name}".rpartition(".")[0]
    found = violations(Module(name, source, tuple(imports_of(source, package))))
    assert found and said in found[0]


def test_what_the_table_allows():
    for name, source in [
        ("nn.linear", "from __future__ import annotations\nimport math, jax, numpy\nimport flax"),
        ("models.tokenizer", "def f():\n    import transformers"),
        ("weights.from_bin", "def f():\n    import torch"),
        ("data.mmeb", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import jax"),
        ("train", "from absl import flags\nfrom vlm2vec_jax.training import state"),
        ("models.phi3v.model", "from vlm2vec_jax.models.phi3v import clip\nimport jax"),
        ("models.qwen3_vl.model", "from vlm2vec_jax.models.qwen_vl import text\nimport jax"),
    ]:
        package = f"{NAME}.{name}".rpartition(".")[0]
        assert not violations(Module(name, source, tuple(imports_of(source, package)))), name


def test_code_is_searched_for_environment_and_pickles():
    bad = "x = os.environ['A']\nnp.load(p, allow_pickle=True)\nnp.load(p, allow_pickle=False)"
    found = code_violations(Module("embedder", bad, ()))
    assert len(found) == 2 and "os.environ" in found[0] and "allow_pickle" in found[1]


def test_loading_is_followed_through_other_modules():
    def fake(name, source):
        return Module(name, source, tuple(imports_of(source, NAME)))

    modules = {
        "": fake("", ""),
        "inputs": fake("inputs", "from vlm2vec_jax import helper"),
        "helper": fake("helper", "def f():\n    from vlm2vec_jax import far\nimport jax"),
        "far": fake("far", "import jax"),
    }
    assert set(loads("inputs", modules)) == {"", "inputs", "helper"}


def test_importing_the_package_loads_nothing_heavy():
    heavy = ["jax", "flax", "transformers", "tokenizers", "grain", "numpy", "PIL", "pyarrow"]
    code = (
        "import sys, vlm2vec_jax\n"
        "assert vlm2vec_jax.__version__\n"
        "assert 'Embedder' in dir(vlm2vec_jax)\n"
        f"heavy = [m for m in {heavy} if m in sys.modules]\n"
        "assert not heavy, heavy\n"
        "vlm2vec_jax.MultimodalInput('a text')\n"
        "assert 'jax' not in sys.modules and 'transformers' not in sys.modules\n"
        "try:\n"
        "    vlm2vec_jax.Nothing\n"
        "except AttributeError:\n"
        "    print('fine')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    assert done.stdout.strip() == "fine", done.stderr


def test_flags_and_configuration_load_no_jax():
    code = (
        "import sys\n"
        "from vlm2vec_jax import config, config_check, flags\n"
        "assert 'jax' not in sys.modules, 'jax was imported'\n"
        "print('fine')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    assert done.stdout.strip() == "fine", done.stderr


def test_every_module_opens_with_licence_and_docstring():
    for m in MODULES.values():
        assert m.source.startswith("# SPDX-License-Identifier: Apache-2.0\n"), m.name
        assert ast.get_docstring(ast.parse(m.source)), m.name
