# SPDX-License-Identifier: Apache-2.0
"""The report of `plan.check` in words."""

from __future__ import annotations

from typing import Any

from vlm2vec_jax.training import fitting


def words(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The report as (subject, words)."""
    peak, hbm = report["peak_bytes_per_chip"], report["hbm_bytes_per_chip"]
    how = f"GradCache, chunks of {report['chunk_tokens']:,} tokens over all chips"
    lines = [
        ("mesh", report["mesh"]),
        ("mixture", report["assumptions"]),
        (
            "parameters",
            f"{report['parameters_trained']:,} trained, {report['parameters_frozen']:,} frozen",
        ),
        (
            "batch",
            f"{report['batch_size']} pairs; {how if report['grad_cache'] else 'all at once'}; "
            f"{report['real_tokens']:.0%} of tokens and {report['real_units']:.0%} of visual units "
            f"real",
        ),
    ]
    lines += [
        (
            "",
            f"{g['chunks']} chunks ({g['used']} used) of {g['rows']} rows of {g['tokens']} tokens, "
            f"{g['units']} visual units, {g['sequences']} sequences",
        )
        for g in report["groups"]
    ]
    kept = report["remat"]
    if report["remat_vision"] != kept:
        kept += f", in the vision tower {report['remat_vision']}"
    lines.append(("remat", kept))
    if report["chosen"]:
        lines.append(("chosen", report["chosen"]))
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in report.get("memory", {}).items())
    lines.append(
        (
            "memory",
            f"{peak / 1e9:.2f} of {hbm / 1e9:.2f} GB per chip{f' ({parts})' if parts else ''}",
        )
    )
    for place, kinds in report["collectives"].items():
        told = "; ".join(
            f"{kind} {n['operations']} times, largest {n['largest_bytes'] / 1e6:.2f} MB, in all "
            f"{n['total_bytes'] / 1e6:.2f} MB"
            for kind, n in kinds.items()
        )
        where = (
            "outside loops" if place == "outside" else "inside loops, one pass of each chunk loop"
        )
        lines.append(("collectives", f"{where}: {told or 'none'}"))
    most = report.get("largest_chunk_tokens")
    if most is not None:
        how = "estimated to fit"
        if report["searched"]:
            how = f"compiled and found to fit, of {1 + len(report['search'])} sizes"
        lines.append(("chunk", f"{how}: packing.chunk_tokens up to {most:,}"))
    embedding = report.get("embedding")
    if embedding is not None:
        size = embedding["peak_bytes_per_chip"] / 1e9
        lines.append(
            (
                "embedding",
                f"{embedding['rows']} rows of {embedding['tokens']} tokens at a time: {size:.2f} "
                f"GB per chip",
            )
        )
    flops = report["useful_flops_per_pair"] / 1e12
    lines.append(("FLOPs", f"{flops:.3g} TFLOP useful per pair (nothing computed twice)"))
    step = report.get("flops")
    if step:
        lines.append(
            (
                "",
                f"a step computes {step['products'] / 1e12:,.0f} TFLOP per chip and "
                f"{step['attention'] / 1e12:,.0f} in attention's kernels, "
                f"{step['executed_over_useful']:.2f} times the {step['useful'] / 1e12:,.0f} of "
                f"{step['passes']} forward passes of the real tokens",
            )
        )
    lines.append(("verdict", verdict(report)))
    return lines


def verdict(report: dict[str, Any]) -> str:
    """In plain words whether it fits."""
    share = report["peak_bytes_per_chip"] / report["hbm_bytes_per_chip"]
    if report["fits"]:
        return f"it fits: {share:.0%} of a chip's memory"
    return (
        f"it does not fit: {share:.0%} of a chip's memory ({fitting.USABLE:.0%} can be used). "
        f"Lower packing.chunk_tokens, raise mesh.fsdp, or set remat=full"
    )
