# SPDX-License-Identifier: Apache-2.0
"""Processor options: what a user may choose about how inputs are encoded, over all backbones.

One table serves the flags of `embed` and `evaluate`, the configuration's fields, what
`vlm2vec.json` records, and the check that a backbone has a use for what was asked of it. A
backbone lists the names it understands (`Backbone.options`); an option nobody chose is what the
record of the trained model says, and without a record what the model's folder says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from vlm2vec_jax.errors import UserError, raise_problems


@dataclasses.dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
      words: what it is, for `--help`.
      choices: the words it may be; empty for a whole number of at least 1, or any text.
      text: any text will do.
      replaces: options whose recorded values no longer hold where this one is chosen.
      field: dotted path of the configuration's field, in which "" or 0 means not chosen.
    """

    words: str
    field: str
    choices: tuple[str, ...] = ()
    text: bool = False
    replaces: tuple[str, ...] = ()


OPTIONS: dict[str, Option] = {
    "num_crops": Option("most sub-images per image", "data.num_crops"),
    "max_len": Option("most tokens of a text, images never cut", "data.max_len"),
    "resolution": Option(
        "what images are resized to before the model's own processing: high 1344 x 1344, mid 672 "
        "x 672, low 128 x 128 (all without regard to their shape), or native, as they are",
        "data.resolution",
        ("native", "high", "mid", "low"),
    ),
    "pixel_limits": Option(
        "how large images are to the model: folder (as its folder says; VLM2Vec v1's evaluation), "
        "vlm2vec_train (256 to 1280 tokens; its training) or vlm2vec_v2 (4 to 1280; V2's training "
        "and evaluation); min_pixels and max_pixels say it in numbers",
        "data.pixel_limits",
        ("folder", "vlm2vec_train", "vlm2vec_v2"),
        replaces=("min_pixels", "max_pixels"),
    ),
    "min_pixels": Option("fewest pixels of an image as the model sees it", "data.min_pixels"),
    "max_pixels": Option("most pixels of an image as the model sees it", "data.max_pixels"),
    "image_positions": Option(
        "where image tokens stand: mrope (by row and column), by_vision_start (so only behind "
        "<|vision_start|>), or sequential (as text)",
        "model.image_positions",
        ("mrope", "by_vision_start", "sequential"),
    ),
    "image_markers": Option(
        "what <|image_k|> becomes: bare (the image alone) or wrapped (between vision start and "
        "vision end)",
        "model.image_markers",
        ("bare", "wrapped"),
    ),
    "transparency": Option(
        "transparent images: white (composited on it) or drop (the alpha channel is ignored)",
        "data.transparency",
        ("white", "drop"),
    ),
    "template": Option(
        "what inputs are put in: none, or embedding, the conversation of Qwen3-VL-Embedding",
        "model.template",
        ("none", "embedding"),
    ),
    "instruction": Option(
        "the instruction in that conversation, for all inputs", "model.instruction", text=True
    ),
}
"""Every option by name."""


def choose(
    backbone: str,
    known: Collection[str],
    given: Mapping[str, Any],
    recorded: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The options of a processor.

    Args:
      backbone: its name, for the message.
      known: the options it understands.
      given: what the user chose; None is not chosen.
      recorded: the processor's settings in `vlm2vec.json`, for what was not chosen.

    Returns:
      A value, or None, for each of `known`.

    Raises:
      UserError: listing what was chosen and means nothing to this backbone, or is no such word.
    """
    problems = []
    for name, value in given.items():
        if value is None:
            continue
        option = OPTIONS.get(name)
        if name not in known:
            problems.append(
                f"{name}={value!r}: {backbone} has no such option; it has {', '.join(known)}"
            )
        elif option is not None and option.choices and value not in option.choices:
            problems.append(f"{name} must be one of {', '.join(option.choices)}, not {value!r}")
    raise_problems("Unusable options for this model", problems)
    recorded = dict(recorded or {})
    for name, value in given.items():
        for replaced in OPTIONS[name].replaces if value is not None and name in OPTIONS else ():
            recorded.pop(replaced, None)

    def chosen(name: str) -> Any:
        value = given.get(name)
        return recorded.get(name) if value is None else value

    return {name: chosen(name) for name in known}


def check_number(name: str, value: Any) -> None:
    """Refuse a number that is not whole or below 1.

    Raises:
      UserError: naming the option.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name} must be a whole number of at least 1, not {value!r}")
