# SPDX-License-Identifier: Apache-2.0
"""What is known of a chip: its peak rate of bfloat16 products, its links, its memory in use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

# Dense bfloat16 FLOP/s as the makers' data sheets give them, by a part of jax's `device_kind`
# (lower case); the first that fits counts.
_PEAKS = (
    ("tpu v6", 918e12),
    ("tpu7", 2307e12),
    ("tpu v5p", 459e12),
    ("tpu v5 lite", 197e12),
    ("tpu v5e", 197e12),
    ("tpu v5", 459e12),
    ("tpu v4", 275e12),
    ("b200", 2250e12),
    ("h200", 989e12),
    ("h100 pcie", 756e12),
    ("h100", 989e12),
    ("a100", 312e12),
    ("l40s", 362e12),
    ("l4", 121e12),
)

# Bytes/s that a chip receives from those beside it along one axis of a mesh, by the data sheets:
# over two of a TPU's four or six links, one way; over NVLink or, without, sixteen lanes of PCIe.
_LINKS = (
    ("tpu v6", 200e9),
    ("tpu v5p", 200e9),
    ("tpu v5 lite", 100e9),
    ("tpu v5e", 100e9),
    ("tpu v5", 200e9),
    ("tpu v4", 100e9),
    ("b200", 900e9),
    ("h200", 450e9),
    ("h100 pcie", 64e9),
    ("h100", 450e9),
    ("a100", 300e9),
    ("l40s", 32e9),
    ("l4", 32e9),
)


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of a chip by jax's name for it; None for one that is not known.

    A CPU has no such figure: None.
    """
    return _of(device_kind, _PEAKS)


def link_bytes(device_kind: str) -> float | None:
    """Bytes/s that a chip receives at most where each shares something with those beside it.

    Chips are taken to be on one axis of a slice, or in one machine. None for one not known.
    """
    return _of(device_kind, _LINKS)


def _of(device_kind: str, figures: Iterable[tuple[str, float]]) -> float | None:
    kind = device_kind.lower()
    return next((figure for name, figure in figures if name in kind), None)


def mfu(flops: float, seconds: float, devices: Iterable[Any]) -> float | None:
    """Share of the devices' peak that `flops` useful FLOPs in `seconds` are; None if unknown."""
    peaks = [peak_flops(getattr(device, "device_kind", "")) for device in devices]
    if seconds <= 0 or not peaks or any(peak is None for peak in peaks):
        return None
    return flops / seconds / sum(peak for peak in peaks if peak is not None)


def peak_memory(devices: Iterable[Any]) -> int | None:
    """Most bytes that any of these (local) devices has had in use; None where none tells."""
    told = []
    for device in devices:
        stats = device.memory_stats() or {}
        if "peak_bytes_in_use" in stats:
            told.append(int(stats["peak_bytes_in_use"]))
    return max(told, default=None)
