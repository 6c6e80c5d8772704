# SPDX-License-Identifier: Apache-2.0
"""The experiment configuration: contract names, messages, the config files."""

import dataclasses
import importlib.util
import json

import pytest

from vlm2vec_jax.config import (
    Config,
    check,
    deciding,
    diff,
    field_types,
    fingerprint,
    flatten,
    from_dict,
    names,
    subset_names,
    target_names,
    to_dict,
)
from vlm2vec_jax.config_check import remarks
from vlm2vec_jax.config_groups import REFERENCE_TARGETS
from vlm2vec_jax.errors import UserError

CONTRACT = """model.path model.adapter model.dtype adapter.type adapter.rank adapter.alpha
adapter.dropout adapter.targets data.path data.subsets data.split data.image_root
data.max_examples_per_subset data.num_crops data.max_len data.on_bad_example batch_size steps seed
temperature output optim.lr optim.warmup_steps optim.schedule optim.weight_decay optim.clip_norm
mesh.data mesh.fsdp mesh.tensor grad_cache checkpoint.every checkpoint.keep""".split()

PINNED = "fab939e6553281dc617344ffb87c3e2de50eed072ef84365e7f4d30bbeea1c6f"

GOLDEN_CONFIGS = [
    *("mini", "mmeb", "mmeb:lora", "mmeb:full"),
    *("mmeb_qwen2vl", "mmeb_qwen2vl:7b,v5e-64", "mmeb_v2", "mmeb_best", "mmeb_llava_next"),
]


def usable() -> Config:
    config = Config(output="out")
    config.model.path, config.data.path = "model", "data"
    return config


def load(repository, name: str) -> Config:
    file, _, arg = name.partition(":")
    spec = importlib.util.spec_from_file_location(
        f"config_{file}", repository / "configs" / f"{file}.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg) if arg else module.get_config()


def as_text(config: Config) -> str:
    return "".join(f"{path} = {value!r}\n" for path, value in flatten(config).items())


def problems_of(config) -> str:
    with pytest.raises(UserError) as raised:
        check(config)
    return str(raised.value)


def test_contract_names_are_there():
    missing = set(CONTRACT) - set(field_types())
    assert not missing


def test_defaults_pass_once_paths_are_given():
    assert check(usable()).batch_size == 1024


def test_empty_paths_are_all_named():
    message = problems_of(Config())
    for path in ("model.path", "data.path", "output"):
        assert f"{path} is empty" in message


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("steps", "400", "steps must be a whole number, not '400'"),
        ("steps", True, "steps must be a whole number, not True"),
        ("steps", 0, "steps must be at least 1, not 0"),
        ("batch_size", 1, "batch_size must be at least 2, not 1"),
        ("temperature", 0, "temperature must be above 0, not 0.0"),
        ("temperature", float("nan"), "temperature must be a finite number"),
        ("optim.lr", -1e-3, "optim.lr must be above 0, not -0.001"),
        ("optim.beta2", 1.0, "optim.beta2 must be at least 0 and below 1, not 1.0"),
        ("optim.schedule", "step", "optim.schedule must be one of linear, cosine, constant"),
        ("optim.warmup_steps", -1, "optim.warmup_steps must be at least 0, not -1"),
        ("adapter.type", "ia3", "adapter.type must be one of lora, dora, none, not 'ia3'"),
        ("adapter.targets", " , ", "adapter.targets is empty"),
        ("adapter.dropout", 1, "adapter.dropout must be at least 0 and below 1"),
        ("model.dtype", "float16", "model.dtype must be one of bfloat16, float32"),
        ("data.subsets", 7, "data.subsets: expected a comma list of names, not 7"),
        ("data.split", "", "data.split is empty"),
        ("data.on_bad_example", "ignore", "data.on_bad_example must be one of error, skip"),
        ("checkpoint.resume", "yes", "checkpoint.resume must be True or False"),
        ("mesh.fsdp", 0, "mesh.fsdp must be at least 1, or -1 for the devices that are left"),
        ("mesh.fsdp", -1, "only one of the mesh axes can be -1, not mesh.data and mesh.fsdp"),
        ("mesh.data", 3, "batch_size (1024) is not divisible by the 3 shards"),
        ("packing.row_tokens", 128, "packing.row_tokens (128) is less than data.max_len (256)"),
        ("grad_cache", "always", "grad_cache must be one of auto, on, off"),
        ("remat", "some", "remat must be one of auto, none, dots, offload, full"),
        ("tracking.wandb", "yes", "tracking.wandb must be one of off, offline, online"),
        ("eval.every", 10, "eval.path is empty, but eval.every asks for evaluations"),
        ("profile", "5", "profile '5': give START:STOP"),
        ("attention", "flash", "attention must be one of auto, xla, dense, splash, cudnn, triton"),
    ],
)
def test_each_mistake_is_said_in_words(path, value, said):
    config = usable()
    *group, name = path.split(".")
    setattr(getattr(config, group[0]) if group else config, name, value)
    message = problems_of(config)
    assert said in message
    assert "(1 problem)" in message


def test_mistakes_are_collected():
    config = usable()
    config.steps, config.optim.lr, config.adapter.type = "many", 0.0, "x"
    message = problems_of(config)
    assert "(3 problems)" in message
    assert "steps must be" in message and "optim.lr must" in message and "adapter.type" in message


def test_chunks_hold_whole_rows():
    config = usable()
    config.packing.row_tokens, config.packing.chunk_tokens = 512, 1000
    assert "packing.chunk_tokens (1000) is not a multiple" in problems_of(config)


def test_an_adapter_cannot_start_full_training():
    config = usable()
    config.adapter.type, config.model.adapter = "none", "adapter"
    assert "merge the adapter first" in problems_of(config)


def test_a_wrong_group_and_a_wrong_object_are_named():
    config = usable()
    config.optim = {"lr": 1e-3}
    assert "optim must be a OptimConfig" in problems_of(config)
    assert "must return a vlm2vec_jax.config.Config, not dict" in problems_of({"steps": 3})


@pytest.mark.parametrize(
    "value",
    ["A,B-c", " A , B-c,", "('A', 'B-c')", "['A','B-c']", "(A,B-c)", ("A", "B-c"), ["A", "B-c"]],
)
def test_lists_of_names_in_every_form(value):
    assert names(value) == ("A", "B-c")
    config = usable()
    config.data.subsets = value
    assert subset_names(config) == ("A", "B-c")
    assert check(config).data.subsets == "A,B-c"


def test_no_subsets_means_all_and_targets_are_the_reference_list():
    assert subset_names(usable()) == ()
    assert target_names(usable()) == tuple(REFERENCE_TARGETS.split(","))
    assert len(target_names(usable())) == 8


def test_whole_numbers_become_fractions():
    config = usable()
    config.optim.lr = 1
    assert isinstance(check(config).optim.lr, float)


def test_no_data_axis_means_all_devices():
    config = usable()
    config.mesh.data = 0
    assert check(config).mesh.data == -1


def test_odd_but_possible_settings_are_remarked():
    config = usable()
    assert remarks(config) == []
    config.optim.warmup_steps = 2000
    assert "leaves no step of the 2000" in remarks(check(config))[0]


def test_to_dict_survives_json():
    config = usable()
    config.data.subsets = ("A", "B")
    stored = json.loads(json.dumps(to_dict(config)))
    assert stored["data"]["subsets"] == "A,B"
    assert from_dict(stored) == config


def test_from_dict_names_unknown_fields():
    with pytest.raises(UserError, match=r"unknown field optim\.learning_rate"):
        from_dict({"optim": {"learning_rate": 1.0}, "steps": 3})


def test_fingerprint_follows_what_decides_the_result():
    base = fingerprint(usable())
    assert len(base) == 64
    for path in field_types():
        config = usable()
        *group, name = path.split(".")
        owner = getattr(config, group[0]) if group else config
        value = getattr(owner, name)
        changed = (not value) if isinstance(value, bool) else value + type(value)(1)
        setattr(owner, name, changed)
        assert (fingerprint(config) != base) == (path in deciding(usable())), path
    assert {"output", "mesh.data", "packing.row_tokens"}.isdisjoint(deciding(usable()))


def test_fingerprint_does_not_change_between_versions():
    # A checkpoint of an older version is compared by this value: change it knowingly.
    text = json.dumps(deciding(usable()), sort_keys=True)
    assert json.loads(text)["optim.lr"] == 2e-5
    assert fingerprint(usable()) == PINNED


def test_fingerprint_ignores_the_form_of_values():
    config = usable()
    config.adapter.alpha = 64
    config.adapter.targets = tuple(REFERENCE_TARGETS.split(","))
    config.data.path = "data/"
    assert fingerprint(config) == fingerprint(usable())


def test_diff_names_fields():
    now = usable()
    now.optim.lr, now.output = 0.5, "elsewhere"
    assert diff(usable(), now) == [
        "optim.lr: 2e-05 before, 0.5 now",
        "output: 'out' before, 'elsewhere' now",
    ]
    assert diff(usable(), now, deciding_only=True) == ["optim.lr: 2e-05 before, 0.5 now"]
    assert diff(usable(), usable()) == []


@pytest.mark.parametrize("name", GOLDEN_CONFIGS)
def test_config_files_resolve_to_their_golden_texts(repository, name):
    config = check(load(repository, name))
    golden = repository / "tests" / "golden_configs" / f"{name.replace(':', '_')}.txt"
    assert as_text(config) == golden.read_text()


@pytest.mark.parametrize("file", ["mmeb_qwen2vl", "mmeb_best", "mmeb_llava_next"])
@pytest.mark.parametrize(("machine", "mesh"), [("v5e-64", (8, 8)), ("v5p-32", (4, 4))])
def test_recipes_of_7b_are_laid_out_for_pods(repository, file, machine, mesh):
    size = "" if file == "mmeb_llava_next" else "7b,"
    laid, plain = load(repository, f"{file}:{size}{machine}"), load(repository, f"{file}:{size}")
    assert (laid.mesh.data, laid.mesh.fsdp) == mesh
    laid.mesh = plain.mesh
    assert laid == plain
    for arg, said in (
        (f"{size}v9", "no variant 'v9'; known are .*v5e-64, v5p-32"),
        ("v5e-64,v5p-32", "asks for v5e-64 and v5p-32"),
    ):
        with pytest.raises(UserError, match=said):
            load(repository, f"{file}:{arg}")


def test_mmeb_is_the_papers_recipe(repository):
    config = load(repository, "mmeb")
    assert (config.batch_size, config.steps, config.temperature) == (1024, 2000, 0.02)
    assert (config.adapter.type, config.adapter.rank, config.adapter.alpha) == ("dora", 8, 64.0)
    assert len(subset_names(config)) == 20
    assert load(repository, "mmeb:full").adapter.type == "none"


@pytest.mark.parametrize(
    ("machine", "chips"),
    [("v5e-64", 64), ("v5p-32", 16), ("v6e-16", 16), ("h100-8", 8), ("h200-1", 1)],
)
def test_presets_use_all_chips_of_their_machine(repository, machine, chips):
    for kind in ("", "lora", "full"):
        config = check(load(repository, f"mmeb:{','.join(filter(None, (kind, machine)))}"))
        mesh = config.mesh
        assert mesh.data * mesh.fsdp * mesh.tensor == chips
        # What fits is chosen there.
        assert (config.packing.chunk_tokens, config.grad_cache, config.remat) == (0, "auto", "auto")
        assert config.adapter.type == {"": "dora", "lora": "lora", "full": "none"}[kind]
        recipe = load(repository, f"mmeb:{kind}")
        assert fingerprint(config) == fingerprint(recipe)  # where it runs decides nothing


@pytest.mark.parametrize("name", ["mmeb:lora,full", "mmeb:v5e-64,v6e-16"])
def test_two_kinds_or_machines_are_refused(repository, name):
    with pytest.raises(UserError, match="asks for"):
        load(repository, name)


@pytest.mark.parametrize("name", ["mmeb:qlora", "mini:large"])
def test_an_unknown_variant_is_named(repository, name):
    with pytest.raises(UserError, match=name.split(":")[1]):
        load(repository, name)


def test_configs_are_not_frozen():
    assert not Config.__dataclass_params__.frozen
    for field in dataclasses.fields(Config):
        if dataclasses.is_dataclass(field.type):
            assert not field.type.__dataclass_params__.frozen
