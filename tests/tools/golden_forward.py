# SPDX-License-Identifier: Apache-2.0
"""Inputs and what torch makes of them: ids, positions, features, layers, embeddings, gradients."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

TEMPERATURE = 0.02
RULES = ("mrope", "by_vision_start", "sequential")
MARKER = re.compile(r"<\|image_(\d+)\|>")
KEPT_LAYERS = 6
"""How many tokens of a sequence are kept of each layer."""

CASES = (
    # name, text, images, whether placeholders stand between vision start and end
    ("text", "What is shown in the picture?\n", (), False),
    ("letter", "a", (), False),
    ("bare", "<|image_1|> Represent the given image.\n", ("photo_astronaut_300x200",), False),
    ("wrapped", "<|image_1|> Represent the given image.\n", ("photo_astronaut_300x200",), True),
    ("wide", "<|image_1|> Represent the given image.\n", ("smooth_1400x100",), True),
    ("tall", "Find this: <|image_1|>", ("noise_100x700",), True),
    ("small", "<|image_1|>\nWhat?", ("noise_37x51",), False),
    ("alpha", "<|image_1|> a", ("rgba_400x150",), True),
    ("two", "<|image_1|> and <|image_2|> and dogs\n", ("gray_200x300", "smooth_337x336"), True),
    ("two_bare", "<|image_1|> or <|image_2|>", ("palette_250x190", "noise_100x700"), False),
    ("touching", "2<|image_1|><|image_2|>", ("smooth_336x336", "photo_china_201x320"), True),
)
QUERIES = ("bare", "text", "two", "tall")
TARGETS = ("letter", "wide", "small", "alpha")


@dataclasses.dataclass
class Case:
    """One input, ready for torch."""

    name: str
    text: str
    images: tuple[str, ...]
    wrapped: bool
    inputs: dict[str, torch.Tensor]
    positions: dict[str, np.ndarray]  # rule -> i64 [3, T] (Qwen) or [T]


def prepare(backbone: str, folder: Path, images: Path) -> list[Case]:
    """All cases of a checkpoint."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    make = _llava if backbone == "llava_next" else _qwen
    cases = []
    for name, text, names, wrapped in CASES:
        pictures = [Image.open(images / f"{n}.png") for n in names]
        inputs, positions = make(folder, config, tokenizer, text, pictures, wrapped)
        cases.append(Case(name, text, names, wrapped, inputs, positions))
    return cases


def _expand(text: str, counts: list[int], token: str, wrapped: bool) -> str:
    def one(match: re.Match) -> str:
        pads = token * counts[int(match.group(1)) - 1]
        return f"<|vision_start|>{pads}<|vision_end|>" if wrapped else pads

    return MARKER.sub(one, text)


def _qwen(folder, config, tokenizer, text, pictures, wrapped):
    inputs: dict[str, torch.Tensor] = {}
    grids = np.zeros((0, 3), np.int64)
    if pictures:
        processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(folder)
        done = processor(images=pictures, return_tensors="pt")
        inputs.update(pixel_values=done["pixel_values"], image_grid_thw=done["image_grid_thw"])
        grids = done["image_grid_thw"].numpy()
    counts = [int(g.prod()) // 4 for g in grids]
    ids = np.array(tokenizer.encode(_expand(text, counts, "<|image_pad|>", wrapped)).ids)
    inputs["input_ids"] = torch.from_numpy(ids)[None]
    pad, start = config["image_token_id"], config["vision_start_token_id"]
    merged = grids[:, 1:] // 2
    positions = {rule: qwen_positions(ids, merged, pad, start, rule) for rule in RULES}
    return inputs, positions


def qwen_positions(ids, merged, pad: int, start: int, rule: str) -> np.ndarray:
    """Positions [3, T] of one sequence.

    Args:
      ids: [T].
      merged: height and width of each image in tokens, [I, 2].
      pad: id of an image token.
      start: id of `<|vision_start|>`.
      rule: `mrope`: every run of image tokens is an image (transformers 5); `by_vision_start`:
        as many of the first runs are images as `<|vision_start|>` stand right before an image
        token (4.49 to 4.57); `sequential`: 0..T-1.
    """
    if rule == "sequential":
        return np.broadcast_to(np.arange(len(ids)), (3, len(ids))).copy()
    found = len(merged)
    if rule == "by_vision_start":
        found = int(((ids[:-1] == start) & (ids[1:] == pad)).sum())
    out, at, position, image = np.zeros((3, len(ids)), np.int64), 0, 0, 0
    while at < len(ids):
        if ids[at] == pad and image < found:
            h, w = merged[image]
            n = int(h * w)
            out[0, at : at + n] = position
            out[1, at : at + n] = position + np.repeat(np.arange(h), w)
            out[2, at : at + n] = position + np.tile(np.arange(w), h)
            position += int(max(h, w))
            at, image = at + n, image + 1
        else:
            out[:, at] = position
            position, at = position + 1, at + 1
    return out


def _llava(folder, config, tokenizer, text, pictures, wrapped):
    inputs: dict[str, torch.Tensor] = {}
    counts = []
    if pictures:
        images = transformers.LlavaNextImageProcessorPil.from_pretrained(folder)
        done = images(images=pictures, return_tensors="pt")
        inputs.update(pixel_values=done["pixel_values"], image_sizes=done["image_sizes"])
        counts = [llava_tokens(images, config, *map(int, s)) for s in done["image_sizes"]]
    ids = tokenizer.encode(_expand(text, counts, "<image>", False)).ids
    inputs["input_ids"] = torch.tensor([ids])
    return inputs, {}


def llava_tokens(images, config: dict, height: int, width: int) -> int:
    """Image tokens as transformers' processor counts them."""
    vision = config["vision_config"]
    counter = object.__new__(transformers.LlavaNextProcessor)
    counter.image_processor, counter.patch_size = images, vision["patch_size"]
    counter.num_additional_image_tokens = 1
    side = vision["image_size"]
    return counter._get_number_of_features(height, width, side, side) - 1


def forward(model: torch.nn.Module, case: Case, rule: str) -> torch.Tensor:
    """Post-norm hidden states [T, D] of one sequence alone."""
    inputs = dict(case.inputs)
    if case.positions:
        inputs["position_ids"] = torch.from_numpy(case.positions[rule])[:, None]
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    out = base.model(**inputs, use_cache=False, return_dict=True)
    return out.last_hidden_state[0]


def embed(model: torch.nn.Module, case: Case, rule: str = "mrope") -> torch.Tensor:
    """The normalised state of the last token [D]."""
    return torch.nn.functional.normalize(forward(model, case, rule)[-1], dim=0)


@contextlib.contextmanager
def recorded(model: torch.nn.Module, qwen3: bool) -> Iterator[dict[str, torch.Tensor]]:
    """Collect inputs and outputs of layers while torch runs."""
    found: dict[str, torch.Tensor] = {}
    handles = []

    def keep(name):
        def hook(module, args, output):
            found[name] = output[0] if isinstance(output, tuple) else output

        return hook

    language = model.model.language_model
    for i, layer in enumerate(language.layers):
        handles.append(layer.register_forward_hook(keep(f"layer_{i}")))

    def merged(module, args, kwargs):
        found["inputs_embeds"] = kwargs["inputs_embeds"]
        for i, value in enumerate(kwargs.get("deepstack_visual_embeds") or []):
            found[f"deepstack_{i}"] = value

    handles.append(language.register_forward_pre_hook(merged, with_kwargs=True))
    if hasattr(model.model, "visual"):
        blocks = model.model.visual.blocks
        for i, block in enumerate(blocks):
            handles.append(block.register_forward_hook(keep(f"vision_layer_{i}")))
        handles.append(model.model.visual.merger.register_forward_hook(keep("vision_merged")))
    else:
        for i, block in enumerate(model.model.vision_tower.encoder.layers):
            handles.append(block.register_forward_hook(keep(f"vision_layer_{i}")))
        projector = model.model.multi_modal_projector
        handles.append(projector.register_forward_hook(keep("vision_projected")))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def record(model: torch.nn.Module, cases: list[Case], qwen3: bool) -> tuple[list[dict], dict]:
    """Everything that is kept of a checkpoint's forward passes: cases and arrays."""
    rows, arrays = [], {}
    rules = RULES if cases[0].positions else ("sequential",)
    for case in cases:
        with torch.no_grad(), recorded(model, qwen3) as found:
            for rule in reversed(rules):  # the last one, `mrope`, is what stays in `found`
                arrays[f"{case.name}/embedding/{rule}"] = embed(model, case, rule).numpy()
        ids = case.inputs["input_ids"][0].tolist()
        row = {
            "name": case.name,
            "text": case.text,
            "images": list(case.images),
            "wrapped": case.wrapped,
            "input_ids": run_lengths(ids),
            "length": len(ids),
        }
        if "image_grid_thw" in case.inputs:
            row["grids"] = case.inputs["image_grid_thw"].tolist()
        if "image_sizes" in case.inputs:
            row["image_sizes"] = case.inputs["image_sizes"].tolist()
            row["pixel_values_shape"] = list(case.inputs["pixel_values"].shape)
        tokens = kept(len(ids), KEPT_LAYERS)
        row["tokens_kept"] = tokens.tolist()
        rows.append(row)
        for rule, value in case.positions.items():
            arrays[f"{case.name}/positions/{rule}"] = value.astype(np.int16)
        for name, value in found.items():
            value = value.detach().numpy()
            if name.startswith(("layer_", "inputs_embeds")):
                value = value[0]
                if name.startswith("layer_"):
                    value = value[tokens]
            elif name.startswith("vision_layer_") or value.ndim == 3:
                flat = value.reshape(-1, value.shape[-1])
                value = flat[kept(len(flat), KEPT_LAYERS)]
            if name == "inputs_embeds" and len(value) > 40:
                at = kept(len(value), 24)
                row["inputs_kept"] = at.tolist()
                value = value[at]
            arrays[f"{case.name}/{name}"] = value
    return rows, arrays


def kept(count: int, most: int) -> np.ndarray:
    """Evenly spread places, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, most).round().astype(np.int64))


def run_lengths(ids: list[int]) -> list[int | list[int]]:
    """Ids with repetitions written as [id, times]."""
    out: list[int | list[int]] = []
    at = 0
    while at < len(ids):
        end = at
        while end < len(ids) and ids[end] == ids[at]:
            end += 1
        out.append(ids[at] if end - at == 1 else [ids[at], end - at])
        at = end
    return out


def contrastive(model: torch.nn.Module, cases: list[Case], rule: str) -> dict[str, torch.Tensor]:
    """Embeddings and mean loss of one batch: query i belongs to target i."""
    by_name = {case.name: case for case in cases}
    query = torch.stack([embed(model, by_name[n], rule) for n in QUERIES])
    target = torch.stack([embed(model, by_name[n], rule) for n in TARGETS])
    logits = query @ target.T / TEMPERATURE
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(len(QUERIES)))
    return {"query_embedding": query, "target_embedding": target, "loss": loss}
