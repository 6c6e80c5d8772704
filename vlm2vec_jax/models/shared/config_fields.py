# SPDX-License-Identifier: Apache-2.0
"""Reading `config.json` and the image processor's file with every complaint collected."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.models.tokenizer import read_json

_BICUBIC = 3
_RESCALE = 1 / 255


class Fields:
    """Fields of a `config.json`, read with every complaint collected."""

    def __init__(self, values: Any, name: str, problems: list[str]):
        self.values = values if isinstance(values, dict) else {}
        self.name, self.problems = name, problems
        if not isinstance(values, dict):
            problems.append(f"{name or 'config.json'} must be an object, not {values!r:.60}")

    def get(self, name: str, default: Any = None) -> Any:
        """The value as it stands; the default also for null."""
        value = self.values.get(name)
        return default if value is None else value

    def label(self, name: str) -> str:
        """The field's full name."""
        return f"{self.name}.{name}" if self.name else name

    def size(self, name: str, default: int | None = None) -> int:
        """A whole number of at least 1; a list of equal ones counts as one (patch sizes)."""
        value = self.get(name, default)
        if isinstance(value, (list, tuple)) and len(set(map(repr, value))) == 1:
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.problems.append(
                f"{self.label(name)} must be a whole number of at least 1, not {value!r}"
            )
            return 1
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            self.problems.append(f"{self.label(name)} must be a positive number, not {value!r}")
            return 1.0
        return float(value)

    def expect(self, name: str, allowed: Collection[Any]) -> None:
        """Complain if a field has a value that is not implemented; absent is fine."""
        value = self.get(name)
        if value is not None and value not in allowed:
            told = " or ".join(repr(v) for v in allowed)
            self.problems.append(f"{self.label(name)} is {value!r}; implemented is {told}")

    def indices(self, name: str, default: Collection[int], below: int) -> tuple[int, ...]:
        """Ascending layer numbers."""
        value = self.get(name, default)
        whole = isinstance(value, (list, tuple)) and all(
            isinstance(v, int) and not isinstance(v, bool) for v in value
        )
        if not whole or list(value) != sorted(set(value)) or any(not 0 <= v < below for v in value):
            self.problems.append(
                f"{self.label(name)} must be ascending layer numbers below {below}, not {value!r}"
            )
            return ()
        return tuple(value)


def read_config_file(folder: str | Path) -> dict[str, Any]:
    """The folder's `config.json`.

    Raises:
      UserError: if it is missing or unreadable.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        raise UserError(f"{path} is missing: is {folder} a model folder?")
    return read_json(path)


def image_fields(folder: str | Path, problems: list[str]) -> Fields:
    """The image processor's settings: `preprocessor_config.json`, else `processor_config.json`.

    What holds for all of them is checked: pixels are resized as Pillow's bicubic does, and rescaled
    by 1/255.

    Args:
      folder: the model folder; where it has neither file there are no fields.
      problems: gets a line per setting that is not implemented.
    """
    path = Path(folder) / "preprocessor_config.json"
    raw = read_json(path)
    if not raw:
        path = Path(folder) / "processor_config.json"
        raw = read_json(path)
        # Newer transformers keeps the image processor's part one level down.
        raw = raw.get("image_processor") or {}
    fields = Fields(raw, path.name, problems)
    check_image_processing(fields)
    return fields


def check_image_processing(fields: Fields) -> None:
    """Complain about what no backbone does to pixels."""
    for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        fields.expect(name, (True,))
    fields.expect("resample", (_BICUBIC,))
    factor = fields.get("rescale_factor", _RESCALE)
    if not isinstance(factor, (int, float)) or abs(factor - _RESCALE) > 1e-9:
        fields.problems.append(
            f"{fields.label('rescale_factor')} is {factor!r}; implemented is 1/255"
        )


def three(
    fields: Fields, name: str, default: tuple[float, float, float]
) -> tuple[float, float, float]:
    """Three numbers, such as the means of the channels."""
    value = fields.get(name, default)
    good = isinstance(value, (list, tuple)) and len(value) == 3
    if not good or not all(isinstance(v, (int, float)) for v in value):
        fields.problems.append(f"{fields.label(name)} must be three numbers, not {value!r}")
        return default
    return (float(value[0]), float(value[1]), float(value[2]))
