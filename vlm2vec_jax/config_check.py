# SPDX-License-Identifier: Apache-2.0
"""The rules behind `config.check`: types, words, ranges, and what does not go together.

Paths are not opened here; whether a folder is there and what is in it is for those who read it.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from vlm2vec_jax import config as config_lib
from vlm2vec_jax.config import LISTS, assign, field_types, flatten, names
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.options import OPTIONS

CHOICES = {
    "model.dtype": ("bfloat16", "float32"),
    "adapter.type": ("lora", "dora", "none"),
    "adapter.dora_dropout": ("fused", "exact"),
    "data.on_bad_example": ("error", "skip"),
    **{o.field: ("", *o.choices) for o in OPTIONS.values() if o.choices},
    "data.stop": ("", "first_exhausted", "all_exhausted"),
    "optim.schedule": ("linear", "cosine", "constant"),
    "grad_cache": ("auto", "on", "off"),
    "attention": ("auto", "xla", "dense", "splash", "cudnn", "triton"),
    "remat": ("auto", "none", "dots", "offload", "full"),
    "remat_vision": ("same", "none", "dots", "offload", "full"),
    "loss.form": ("auto", "dense", "tiled", "ring"),
    "loss.same_query": ("negative", "mask", "positive"),
    "tracking.wandb": ("off", "offline", "online"),
}
"""The words that a field may hold."""

_AT_LEAST = {
    "adapter.rank": 1,
    "data.max_examples_per_subset": 0,
    "data.sub_batch": 0,
    "data.num_crops": 0,
    "data.min_pixels": 0,
    "data.max_pixels": 0,
    "data.max_len": 0,
    "data.workers": 0,
    "optim.warmup_steps": 0,
    "optim.weight_decay": 0,
    "optim.clip_norm": 0,
    "packing.row_tokens": 0,
    "packing.chunk_tokens": 0,
    "checkpoint.every": 0,
    "checkpoint.keep": 1,
    "batch_size": 2,
    "steps": 1,
    "seed": 0,
    "log_every": 1,
    "loss.negatives": 0,
    "loss.hardness": 0,
    "loss.tile": 8,
    "eval.every": 0,
    "eval.max_queries": 0,
    "max_skipped_steps": 0,
}
FEW_PAIRS = 32
"""Below this a batch has few negatives."""
MESH = ("mesh.data", "mesh.fsdp", "mesh.tensor")
_ABOVE_ZERO = (
    "optim.lr",
    "optim.eps",
    "adapter.alpha",
    "temperature",
    "loss.temperature_lr",
    "loss.temperature_min",
)
_SHARES = ("adapter.dropout", "optim.beta1", "optim.beta2")
_FILLED = ("model.path", "data.path", "data.split", "output")


def problems(config: Any) -> list[str]:
    """Every mistake in a configuration, a line each; sound values are settled in place.

    Lists become comma lists, whole numbers in places of fractions become floats, and
    `mesh.data` 0 becomes -1.

    Args:
      config: what a config file returned.

    Returns:
      The problems, empty if there are none.
    """
    if not isinstance(config, config_lib.Config):
        return [
            f"get_config() must return a vlm2vec_jax.config.Config, not {type(config).__name__}"
        ]
    found = _wrong_groups(config)
    if found:
        return found
    mistyped = _wrong_types(config)
    # Ranges are asked only of values that have the right type.
    sound = {p: v for p, v in flatten(config).items() if p not in mistyped}
    return list(mistyped.values()) + _wrong_values(sound) + _wrong_together(sound)


def remarks(config: config_lib.Config) -> list[str]:
    """What works but may not be meant, a line each, for the start-up page."""
    found = []
    if config.optim.warmup_steps >= config.steps:
        found.append(
            f"optim.warmup_steps ({config.optim.warmup_steps}) leaves no step of the "
            f"{config.steps} at the full learning rate"
        )
    if config.adapter.type == "none" and config.model.dtype == "bfloat16":
        found.append("every parameter is trained: float32 copies of all weights are kept")
    if config.batch_size < FEW_PAIRS:
        found.append(
            f"batch_size ({config.batch_size}) is small: a query has only {config.batch_size - 1} "
            f"in-batch negatives, and the loss soon has nothing to teach"
        )
    if config.data.sub_batch > 1 and not config.loss.mask_duplicate_targets:
        found.append(
            "data.sub_batch puts rows of one subset together, where targets repeat themselves: "
            "consider loss.mask_duplicate_targets"
        )
    return found


def _wrong_groups(config: config_lib.Config) -> list[str]:
    return [
        f"{field.name} must be a {field.type.__name__}, not {getattr(config, field.name)!r}"
        for field in dataclasses.fields(config_lib.Config)
        if isinstance(field.type, type)
        and dataclasses.is_dataclass(field.type)
        and not isinstance(getattr(config, field.name), field.type)
    ]


def _wrong_types(config: config_lib.Config) -> dict[str, str]:
    problems: dict[str, str] = {}
    words = {str: "a string", int: "a whole number", float: "a number", bool: "True or False"}
    values = flatten(config)
    for path, kind in field_types().items():
        value = values[path]
        try:
            if path in LISTS:
                value = ",".join(names(value))
            elif path == "mesh.data" and value == 0 and kind is type(value):
                value = -1
            elif kind is float and isinstance(value, int) and not isinstance(value, bool):
                value = float(value)
        except UserError as error:
            problems[path] = f"{path}: {error}"
            continue
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            problems[path] = f"{path} must be {words[kind]}, not {value!r}"
        elif isinstance(value, float) and not math.isfinite(value):
            problems[path] = f"{path} must be a finite number, not {value}"
        else:
            assign(config, path, value)
    return problems


def _wrong_values(values: Mapping[str, Any]) -> list[str]:
    problems = [f"{p} is empty" for p in _FILLED if p in values and not values[p].strip()]
    problems += [
        f"{p} must be one of {', '.join(filter(None, words))}, not {values[p]!r}"
        for p, words in CHOICES.items()
        if p in values and values[p] not in words
    ]
    if values.get("model.dtype") in ("int8", "fp8"):
        problems.append("8-bit weights are for inference: --quantize of embed and evaluate")
    problems += [
        f"{p} must be at least {least}, not {values[p]}"
        for p, least in _AT_LEAST.items()
        if p in values and values[p] < least
    ]
    problems += [
        f"{p} must be above 0, not {values[p]}"
        for p in _ABOVE_ZERO
        if p in values and values[p] <= 0
    ]
    problems += [
        f"{p} must be at least 0 and below 1, not {values[p]}"
        for p in _SHARES
        if p in values and not 0 <= values[p] < 1
    ]
    problems += [
        f"{p} must be at least 1, or -1 for the devices that are left, not {values[p]}"
        for p in MESH
        if p in values and values[p] < 1 and values[p] != -1
    ]
    return problems


def _wrong_together(values: Mapping[str, Any]) -> list[str]:
    """Problems between fields; those of a wrong type are absent from `values`."""
    problems = []
    get = values.get
    free = [axis for axis in MESH if get(axis) == -1]
    if len(free) > 1:
        problems.append(f"only one of the mesh axes can be -1, not {' and '.join(free)}")
    batch, data, fsdp = get("batch_size"), get("mesh.data"), get("mesh.fsdp")
    if batch is not None and data is not None and fsdp is not None:
        shards = max(data, 1) * max(fsdp, 1)  # an axis that is left open is settled later
        if batch % shards:
            problems.append(
                f"batch_size ({batch}) is not divisible by the {shards} shards of "
                f"mesh.data x mesh.fsdp"
            )
    block = get("data.sub_batch", 0)
    if batch is not None and block > 1 and batch % block:
        problems.append(f"batch_size ({batch}) is not a multiple of data.sub_batch ({block})")
    fewest, most = get("data.min_pixels", 0), get("data.max_pixels", 0)
    if 0 < most < fewest:
        problems.append(f"data.min_pixels ({fewest}) is more than data.max_pixels ({most})")
    row, chunk = get("packing.row_tokens", 0), get("packing.chunk_tokens", 0)
    if row > 0 and chunk > 0 and chunk % row:
        problems.append(
            f"packing.chunk_tokens ({chunk}) is not a multiple of packing.row_tokens ({row})"
        )
    if 0 < row < get("data.max_len", 0):
        problems.append(
            f"packing.row_tokens ({row}) is less than data.max_len ({values['data.max_len']}): "
            f"a full sequence would not fit in a row"
        )
    problems += _wrong_loss(values)
    try:
        config_lib.read_range(get("profile", ""))
    except UserError as error:
        problems.append(str(error))
    if get("eval.every", 0) > 0 and not get("eval.path", "?").strip():
        problems.append("eval.path is empty, but eval.every asks for evaluations")
    problems += _wrong_subsets(values)
    kind = get("adapter.type")
    if kind in ("lora", "dora") and not get("adapter.targets", "?"):
        problems.append(f"adapter.targets is empty, but adapter.type is {kind}")
    if kind == "none" and get("model.adapter"):
        problems.append(
            "model.adapter is given, but adapter.type is none (every parameter): merge the "
            "adapter first (python -m vlm2vec_jax.export --format merged) and train from that"
        )
    return problems


def _wrong_loss(values: Mapping[str, Any]) -> list[str]:
    """Problems of the loss; fields of a wrong type are absent from `values`."""
    problems = []
    get = values.get
    if get("loss.same_query") in ("mask", "positive") and not get("loss.mask_duplicate_targets"):
        problems.append(
            f"loss.same_query is {get('loss.same_query')}, which needs "
            f"loss.mask_duplicate_targets: else a target would be right and wrong at once"
        )
    if get("loss.private_negatives") and get("loss.negatives") == 0:
        problems.append("loss.private_negatives is set, but loss.negatives is 0")
    least, most = get("loss.temperature_min"), get("loss.temperature_max")
    start = get("temperature")
    if least is not None and most is not None and start is not None:
        if get("loss.learn_temperature") and not least <= start <= most:
            problems.append(
                f"temperature ({start}) is not within loss.temperature_min ({least}) and "
                f"loss.temperature_max ({most})"
            )
    widths = get("loss.matryoshka")
    if widths:
        try:
            config_lib.prefix_widths(
                config_lib.Config(loss=config_lib.LossConfig(matryoshka=widths))
            )
        except UserError as error:
            problems.append(str(error))
    return problems


def _wrong_subsets(values: Mapping[str, Any]) -> list[str]:
    """Problems of settings by subset; whether the names are subsets is seen when data is opened."""
    problems = []
    for field in ("limits", "weights", "splits"):
        given = values.get(f"data.{field}", "")
        if field == "weights" and given in ("", "equal"):
            continue
        try:
            found = config_lib.settings(given)
        except UserError as error:
            problems.append(f"data.{field}: {error}")
            continue
        for name, text in found.items() if field != "splits" else ():
            if field == "limits" and not (text.isdecimal() and int(text)):
                problems.append(f"data.limits: {name} must have a whole number, not {text!r}")
            elif field == "weights" and not _positive(text):
                problems.append(f"data.weights: {name} must have a number above 0, not {text!r}")
    return problems


def _positive(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False
