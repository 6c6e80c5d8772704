# SPDX-License-Identifier: Apache-2.0
"""The typed experiment configuration: plain dataclasses, one `check` that speaks in words.

A file under `configs/` returns a `Config` from `get_config(arg)`; the command line overrides single
fields (`--config.optim.lr=1e-4`). The field names are a contract with users: rename none of them.
Annotations are real types here (no `from __future__ import annotations`), because the command
line reads them to parse overrides.
"""

import ast
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from typing import Any

from vlm2vec_jax.errors import UserError, raise_problems
from vlm2vec_jax.options import OPTIONS

REFERENCE_TARGETS = "qkv_proj,o_proj,gate_up_proj,down_proj,k_proj,q_proj,out_proj,v_proj"
"""The reference's default list of adapted linears: suffixes of the checkpoint's own names, so on
Phi-3.5-Vision every decoder projection and the CLIP tower's attention."""


class _Group:
    """A group of fields in which a real list of names becomes a comma list when it is set."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, (tuple, list)) and all(isinstance(v, str) for v in value):
            value = ",".join(value)
        super().__setattr__(name, value)


@dataclasses.dataclass
class ModelConfig(_Group):
    """Where training starts.

    Attributes:
      path: a model folder (Hugging Face layout), or a hub id where a network is there.
      adapter: a PEFT adapter folder to start from; empty for a fresh one.
      dtype: "bfloat16" or "float32": what frozen weights and activations are kept in. Trained
        parameters, the loss and the optimizer are float32 either way.
      image_positions: where image tokens stand, for backbones that have a choice: "mrope",
        "by_vision_start" or "sequential"; empty for what the model was trained with.
      image_markers: what `<|image_k|>` becomes, for backbones that have a choice: "bare" or
        "wrapped"; empty for what the model was trained with.
      template: "none" or "embedding", for backbones that have one; empty for what the model was
        trained with.
      instruction: the instruction in that template; likewise.
    """

    path: str = ""
    adapter: str = ""
    dtype: str = "bfloat16"
    image_positions: str = ""
    image_markers: str = ""
    template: str = ""
    instruction: str = ""


@dataclasses.dataclass
class AdapterConfig(_Group):
    """What is trained.

    Attributes:
      type: "lora", "dora", or "none" for every parameter.
      rank: width of the low-rank product.
      alpha: the product is scaled by alpha / rank.
      dropout: share of the low-rank path's input that is dropped in training.
      targets: names of the adapted linears, matched as suffixes; a comma list ("A,B"); "auto"
        for the text model's projections, by the backbone's own names.
    """

    type: str = "dora"
    rank: int = 8
    alpha: float = 64.0
    dropout: float = 0.1
    targets: str = REFERENCE_TARGETS


@dataclasses.dataclass
class DataConfig(_Group):
    """What is learned from.

    Attributes:
      path: folder in MMEB-train's layout, `<path>/<Subset>/<split>-*.parquet`, or own pairs: a
        jsonl, csv or parquet file, or a folder of such files (docs/your-own-data.md); or a TFDS
        data set or a hub id that `python -m vlm2vec_jax.data.prepare` has made ready.
      subsets: which ones, a comma list ("A,B"); empty for every folder found.
      split: "original", "diverse_instruction", or "train" in older releases of MMEB-train.
      image_root: what image paths are relative to; empty for `path`, or the folder in it where
        the images are.
      follow_symlinks: open images to which a symbolic link leads out of the image root.
      splits: splits of single subsets where they differ, a comma list of NAME=SPLIT.
      max_examples_per_subset: the first so many rows of each subset; 0 for all.
      limits: the same for single subsets, a comma list of NAME=ROWS.
      weights: how much of the batches each subset makes up: empty in proportion to its rows, so
        that every row comes once per epoch; "equal"; or a comma list of NAME=WEIGHT for all.
      stop: "first_exhausted" ends the run when the first subset has been gone through once,
        "all_exhausted" when the last has; empty to end after `steps`. `steps` is the most either
        way, and where the schedule ends.
      sub_batch: rows of one subset that stand together in a batch, so that a query meets negatives
        of its own kind; 0 mixes row by row as the reference does.
      num_crops: most local crops per image, for backbones that cut crops; 0 for what the model
        folder says.
      resolution: "native", "high", "mid" or "low", see `options.OPTIONS`; empty for what the model
        was trained with.
      min_pixels: fewest pixels of an image, for backbones of dynamic resolution; 0 for what the
        model folder says.
      max_pixels: the most; likewise.
      transparency: "white" or "drop"; empty for what the model was trained with.
      target_instruction: what stands in front of targets that are text alone: "task" for words by
        the subset's task (`data/target_instruction.py`), or the words themselves; empty for none.
        It is recorded, and the evaluator does the same.
      max_len: most tokens of a sequence, cutting text and never an image; 0 for what the model
        folder says.
      on_bad_example: "error" stops before the first step and lists them, "skip" leaves them out
        and counts them.
      workers: threads that read and decode ahead of the device; 0 for a choice by CPU count.
    """

    path: str = ""
    subsets: str = ""
    split: str = "original"
    splits: str = ""
    image_root: str = ""
    follow_symlinks: bool = False
    max_examples_per_subset: int = 0
    limits: str = ""
    weights: str = ""
    stop: str = ""
    sub_batch: int = 0
    num_crops: int = 4
    resolution: str = ""
    min_pixels: int = 0
    max_pixels: int = 0
    transparency: str = ""
    target_instruction: str = ""
    max_len: int = 256
    on_bad_example: str = "error"
    workers: int = 0


@dataclasses.dataclass
class OptimConfig(_Group):
    """AdamW and its schedule, as the reference trains.

    Attributes:
      lr: the peak learning rate.
      warmup_steps: updates in which the rate climbs from 0 to `lr`.
      schedule: what follows until `steps`: "linear" or "cosine" down to 0, or "constant".
      weight_decay: decoupled decay; 0 in the reference.
      clip_norm: gradients above this global norm are scaled down to it; 0 for no clipping.
      beta1: decay of the first moment.
      beta2: decay of the second moment.
      eps: added to the root of the second moment.
    """

    lr: float = 2e-5
    warmup_steps: int = 200
    schedule: str = "linear"
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8


@dataclasses.dataclass
class MeshConfig(_Group):
    """How the devices are laid out; the product is the number of devices used.

    Attributes:
      data: replicas of the weights, each with its own rows; -1 or 0 for all devices that the
        other two leave.
      fsdp: devices that share the weights, each with its own rows.
      tensor: devices that split each layer's width and share rows.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass
class PackingConfig(_Group):
    """The fixed shapes that sequences are packed into. They bound memory and change no result.

    Attributes:
      row_tokens: length of a packed row; 0 for a choice from the data.
      chunk_tokens: tokens that one device embeds at a time; 0 for a choice from the data.
    """

    row_tokens: int = 0
    chunk_tokens: int = 0


@dataclasses.dataclass
class CheckpointConfig(_Group):
    """When the state is saved.

    Attributes:
      every: steps between two checkpoints; 0 for one at the end only.
      keep: how many of the newest are kept.
      resume: go on from the newest good checkpoint in `output`; False refuses a used folder.
    """

    every: int = 100
    keep: int = 2
    resume: bool = True


@dataclasses.dataclass
class LossConfig(_Group):
    """Variations of the contrastive loss.

    The defaults are the reference's loss; docs/losses.md says what each variation is good for.

    Attributes:
      mask_duplicate_targets: leave out of a query's negatives the targets that are the very same
        input (text and pixels) as its positive. The reference does not.
      same_query: what the targets of other rows with the very same query are to a query:
        "negative" as in the reference, "mask" to leave them out, "positive" for positives too.
        The last two need mask_duplicate_targets.
      margin: leave out negatives whose cosine exceeds the positive's by more than this; below 0
        for never.
      same_source: a query's negatives come from its own subset only.
      symmetric: targets are held against queries as well; the loss is the mean of both.
      negatives: most hard negatives per row that are read from `neg_text`/`neg_image_path` and
        embedded; 0 leaves them alone.
      private_negatives: a hard negative stands against the query of its row only, not all.
      hardness: a negative's logit grows by this times its cosine, so that near ones weigh more;
        0 for none (LLaVE uses 9).
      matryoshka: widths of prefixes that shall be embeddings of their own, a comma list
        ("256,512"); the full width is always among them.
      learn_temperature: train the temperature; `temperature` is where it starts.
      temperature_lr: its learning rate (of its logarithm), with the shape of `optim.schedule`.
      temperature_min: it stays above this
      temperature_max: and below this.
      form: how the matrix of similarities is gone through: "dense" whole, "tiled" block by block,
        "ring" with embeddings spread over the devices, "auto" by batch size and memory. It
        changes no result.
      tile: rows and columns of a block.
    """

    mask_duplicate_targets: bool = False
    same_query: str = "negative"
    margin: float = -1.0
    same_source: bool = False
    symmetric: bool = False
    negatives: int = 0
    private_negatives: bool = False
    hardness: float = 0.0
    matryoshka: str = ""
    learn_temperature: bool = False
    temperature_lr: float = 1e-2
    temperature_min: float = 0.005
    temperature_max: float = 0.5
    form: str = "auto"
    tile: int = 2048


@dataclasses.dataclass
class TrackingConfig(_Group):
    """Where the numbers of a run go besides `metrics.jsonl`.

    Attributes:
      tensorboard: write TensorBoard events, if it is installed.
      wandb: Weights & Biases: "off", "offline" (into the output, to be sent later) or "online".
      project: Weights & Biases' project.
    """

    tensorboard: bool = True
    wandb: str = "off"
    project: str = "vlm2vec_jax"


@dataclasses.dataclass
class EvalConfig(_Group):
    """A small evaluation during training.

    Attributes:
      every: steps between two; 0 for none. The last step is evaluated, too.
      path: folder in MMEB-eval's layout, of held-out rows.
      subsets: which ones, a comma list; empty for every folder found.
      image_root: what image paths are relative to; empty for `path`.
      max_queries: the first so many queries of each subset; 0 for all.
    """

    every: int = 0
    path: str = ""
    subsets: str = ""
    image_root: str = ""
    max_queries: int = 100


@dataclasses.dataclass
class Config:
    """One experiment. The defaults are the recipe of the VLM2Vec paper for Phi-3.5-Vision.

    Attributes:
      model: where training starts.
      adapter: what is trained.
      data: what is learned from.
      optim: the optimizer.
      mesh: the devices.
      packing: shapes on the device.
      checkpoint: when the state is saved.
      loss: variations of the loss.
      tracking: where the numbers go.
      eval: a small evaluation during training; the best model so far is kept in `output/best`.
      batch_size: pairs in a step, over all devices and processes.
      steps: updates in all; the schedule ends there.
      seed: decides the data order, the fresh adapter and dropout.
      temperature: cosines are divided by it.
      output: folder that receives config.json, metrics.jsonl, checkpoints/ and the model.
      grad_cache: "on" embeds chunk by chunk and keeps no activations of the others, "off" takes
        the batch in one piece, "auto" is "off" where the batch is one chunk.
      attention: "xla" (exact, anywhere), "cudnn", "splash", or "auto" by platform.
      remat: what a layer keeps for its backward pass: "none" recomputes nothing, "dots" keeps
        matrix products, "full" recomputes the layer.
      log_every: steps between two lines on the console; metrics.jsonl has every step.
      profile: "START:STOP" traces these steps into `output/profile`; empty for none.
      max_skipped_steps: steps whose loss or gradient is not finite are skipped and reported; with
        one more than so many, in all, the run stops and leaves what reproduces it.
    """

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    packing: PackingConfig = dataclasses.field(default_factory=PackingConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    tracking: TrackingConfig = dataclasses.field(default_factory=TrackingConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    batch_size: int = 1024
    steps: int = 2000
    seed: int = 0
    temperature: float = 0.02
    output: str = ""
    grad_cache: str = "auto"
    attention: str = "auto"
    remat: str = "full"
    log_every: int = 10
    profile: str = ""
    max_skipped_steps: int = 10


LISTS = (
    "data.subsets",
    "data.splits",
    "data.limits",
    "data.weights",
    "adapter.targets",
    "loss.matryoshka",
    "eval.subsets",
)
"""Fields that hold a list of names, written as a comma list."""

NOT_DECIDING = (
    "output",
    "log_every",
    "profile",
    "tracking",
    "eval",
    "max_skipped_steps",
    "checkpoint",
    "mesh",
    "packing",
    "grad_cache",
    "attention",
    "remat",
    "loss.form",
    "loss.tile",
    "data.image_root",
    "data.follow_symlinks",
    "data.workers",
)
"""Fields (or whole groups) that decide where and how fast, not what is learned."""


_ADDED = (
    *(o.field for n, o in OPTIONS.items() if n not in ("num_crops", "max_len")),
    *("data.splits", "data.limits", "data.weights", "data.stop", "data.target_instruction"),
)
"""Fields that older versions did not have: at their default they leave the fingerprint alone."""


def names(value: Any) -> tuple[str, ...]:
    """Read a list of names: "A,B", the text of a list or tuple, or a real one.

    Args:
      value: a comma list, a literal such as "('A', 'B')", or a sequence of strings.

    Returns:
      The names, stripped, empty ones left out, in order.

    Raises:
      UserError: if it is none of these.
    """
    if isinstance(value, str):
        text = value.strip()
        if text[:1] in ("(", "["):
            try:
                value = ast.literal_eval(text)
            except (SyntaxError, ValueError):
                # A shell that eats the inner quotes leaves "(A,B)".
                value = text.strip("()[]").split(",")
            value = (value,) if isinstance(value, str) else value
        else:
            value = text.split(",")
    if not isinstance(value, (tuple, list)) or not all(isinstance(v, str) for v in value):
        raise UserError(f"expected a comma list of names, not {value!r}")
    return tuple(v.strip() for v in value if v.strip())


def read_range(text: str) -> tuple[int, int] | None:
    """`START:STOP` as (first step, last step), counted from 1, both included; None for "".

    Raises:
      UserError: if it is something else, or no step.
    """
    if not text:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"profile {text!r}: give START:STOP in steps from 1, such as 10:12")
    return int(found[1]), int(found[2])


def settings(value: Any) -> dict[str, str]:
    """Read a list of settings, "A=2,B=0.5", by name in order.

    Raises:
      UserError: for an entry that is not NAME=VALUE, or a name that comes twice.
    """
    found: dict[str, str] = {}
    for entry in names(value):
        name, mark, setting = (part.strip() for part in entry.partition("="))
        if not mark or not name or not setting:
            raise UserError(f"expected a comma list of NAME=VALUE, not {entry!r}")
        if name in found:
            raise UserError(f"{name!r} comes twice")
        found[name] = setting
    return found


def subset_names(config: Config) -> tuple[str, ...]:
    """The names in `data.subsets`; empty means every subset found."""
    return names(config.data.subsets)


def target_names(config: Config) -> tuple[str, ...]:
    """The suffixes in `adapter.targets`."""
    return names(config.adapter.targets)


def processor_options(config: Config, known: Collection[str]) -> dict[str, Any]:
    """What the configuration chooses about encoding, None where it leaves the choice open.

    A field that was left at its default is no choice to a backbone that has no such option
    (`data.num_crops` is 4 by default, and most backbones cut no crops).
    """
    values, defaults = flatten(config), flatten(Config())
    return {
        name: values[option.field] or None
        for name, option in OPTIONS.items()
        if name in known or values[option.field] != defaults[option.field]
    }


def prefix_widths(config: Config) -> tuple[int, ...]:
    """The widths in `loss.matryoshka`, rising.

    Raises:
      UserError: if one is not a whole number above 0.
    """
    words = names(config.loss.matryoshka)
    wrong = [word for word in words if not (word.isdecimal() and int(word) > 0)]
    if wrong:
        raise UserError(f"loss.matryoshka: {', '.join(map(repr, wrong))}: widths are whole numbers")
    return tuple(sorted({int(word) for word in words}))


def field_types() -> dict[str, type]:
    """Every field by its dotted path, with its type, in the order of declaration."""
    types: dict[str, type] = {}
    for field in dataclasses.fields(Config):
        if dataclasses.is_dataclass(field.type):
            for inner in dataclasses.fields(field.type):
                types[f"{field.name}.{inner.name}"] = inner.type  # pyright: ignore
        else:
            types[field.name] = field.type  # pyright: ignore
    return types


def flatten(config: Config) -> dict[str, Any]:
    """Every field by its dotted path, with its value, in the order of declaration."""
    values: dict[str, Any] = {}
    for path in field_types():
        value: Any = config
        for part in path.split("."):
            value = getattr(value, part)
        values[path] = value
    return values


def assign(config: Config, path: str, value: Any) -> None:
    """Set the field with this dotted path."""
    *group, name = path.split(".")
    setattr(getattr(config, group[0]) if group else config, name, value)


def check(config: Config) -> Config:
    """Look for every mistake that shows without opening a file, and settle the form of values.

    Lists become comma lists and whole numbers in places of fractions become floats, in place.

    Args:
      config: as a config file and the command line left it.

    Returns:
      The same object.

    Raises:
      UserError: all problems in one message, each with the field, the value and what it may be.
    """
    from vlm2vec_jax import config_check

    problems = config_check.problems(config)
    raise_problems("the configuration does not work", problems)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as nested dicts of plain values, for config.json."""
    result = dataclasses.asdict(config)
    for path in LISTS:
        group, name = path.split(".")
        result[group][name] = ",".join(names(result[group][name]))
    return result


def from_dict(values: Mapping[str, Any]) -> Config:
    """Read what `to_dict` wrote; fields that are absent keep their defaults.

    Raises:
      UserError: naming every unknown field.
    """
    config, known, unknown = Config(), field_types(), []
    for path, value in _flat_items(values):
        if path in known:
            assign(config, path, value)
        else:
            unknown.append(f"unknown field {path}")
    raise_problems("cannot read the stored configuration", unknown)
    return config


def _flat_items(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    items: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            items += [(f"{name}.{inner}", v) for inner, v in value.items()]
        else:
            items.append((name, value))
    return items


def deciding(config: Config) -> dict[str, Any]:
    """The fields that decide what is learned, by dotted path, in one form each.

    Left out are `NOT_DECIDING`. A folder's path is taken as written, without a trailing slash.
    """
    kept = {}
    types = field_types()
    for path, value in flatten(config).items():
        if path in NOT_DECIDING or path.split(".")[0] in NOT_DECIDING:
            continue
        if path in LISTS:
            value = ",".join(names(value))
        elif path in ("model.path", "model.adapter", "data.path") and value:
            value = os.path.normpath(value)
        elif types[path] is float:
            value = float(value)
        kept[path] = value
    return kept


def fingerprint(config: Config) -> str:
    """A SHA-256 (hex) of the fields that decide what is learned; stable across Python versions.

    Two configurations with one fingerprint train the same model up to rounding and dropout draws.
    """
    values = {path: v for path, v in deciding(config).items() if v or path not in _ADDED}
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def diff(before: Config, now: Config, *, deciding_only: bool = False) -> list[str]:
    """Say field by field what changed, for a message on resume.

    Args:
      before: the stored configuration.
      now: the one asked for.
      deciding_only: leave out the fields that do not decide what is learned.

    Returns:
      One line per field that differs, as "optim.lr: 0.001 before, 0.002 now".
    """
    a, b = (deciding(c) if deciding_only else _settled(c) for c in (before, now))
    return [f"{p}: {a[p]!r} before, {b[p]!r} now" for p in a if a[p] != b[p]]


def _settled(config: Config) -> dict[str, Any]:
    return {p: ",".join(names(v)) if p in LISTS else v for p, v in flatten(config).items()}
