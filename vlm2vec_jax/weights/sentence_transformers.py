# SPDX-License-Identifier: Apache-2.0
"""The files that make a model folder one that sentence-transformers loads, images included.

The forms are those of sentence-transformers 6.2 that 5 and vLLM read as well: module types in
their older spelling, pooling of the last token, normalisation, a modality `message` (without it a
text with an image is refused), and a chat template that joins parts without any marks of turns,
because VLM2Vec models were trained on plain prompts; or with those of the model's own conversation,
where it was recorded with one.

What changes an encoding and is another way there is refused (`check_settings`) or written down
(markers, pixel limits, resizing by Pillow). Only the longest text cannot be (`remark`).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm2vec_jax.errors import UserError, raise_problems

VERSION = "6.2.0"
"""Of sentence-transformers, whose forms these are; an older one says so when it loads them."""


@dataclasses.dataclass(frozen=True)
class SentenceTransformers:
    """What a backbone says about itself for this form.

    Attributes:
      image: text that stands for an image in the model's prompts, as `<|image_pad|>`.
      modalities: what it takes, besides messages.
      wrapped: what stands for an image where `image_markers` is `wrapped`.
      requires: processor setting -> the only value that transformers has, and what it does.
      pixel_limits: the settings `min_pixels` and `max_pixels` go to the image processor's file.
      pillow: transformers would resize with torchvision, and we do it as Pillow.
      conversations: setting `template` -> what stands before and behind images and text, with
        `{instruction}` where the setting of that name stands.
    """

    image: str
    modalities: tuple[str, ...] = ("text", "image")
    wrapped: str = ""
    requires: Mapping[str, tuple[Any, str]] = dataclasses.field(default_factory=dict)
    pixel_limits: bool = False
    pillow: bool = False
    conversations: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)


# Images of all messages come first, then the system's text (which is the prompt, as
# sentence-transformers hands it over), then the user's: the order of VLM2Vec's data.
_TEMPLATE = """\
{%- set seen = namespace(images=0, text='') -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set seen.text = seen.text + message['content'] -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}
{%- set seen.images = seen.images + 1 -%}
{%- elif 'text' in part -%}
{%- set seen.text = seen.text + part['text'] -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{{- BEFORE -}}
{%- if seen.images -%}
{{- IMAGE * seen.images -}}
{%- if seen.text and seen.text[0] not in ' \\n\\t' -%}{{- GAP -}}{%- endif -%}
{%- endif -%}
{{- seen.text -}}
{{- BEHIND -}}
"""


def chat_template(image: str, before: str = "", behind: str = "") -> str:
    """The raw template (jinja): images, then prompt, then text.

    Without a conversation around them, one space parts images from a text that does not begin
    with one, as in VLM2Vec's data.
    """
    gap = "" if before or behind else " "
    parts = {"BEFORE": before, "IMAGE": image, "GAP": gap, "BEHIND": behind}
    return re.sub("|".join(parts), lambda found: json.dumps(parts[found[0]]), _TEMPLATE)


def check_settings(form: SentenceTransformers, settings: Mapping[str, Any], named: str) -> None:
    """Refuse a model whose inputs would be encoded otherwise in sentence-transformers.

    Args:
      form: of the backbone.
      settings: of the model's processor.
      named: the model, for the message.

    Raises:
      UserError: listing every such setting.
    """
    problems = []
    for name, (value, there) in form.requires.items():
        found = settings.get(name, value)
        if found != value:
            problems.append(f"{name}={found}: {there} ({name}={value})")
    raise_problems(
        f"{named} cannot become a folder for sentence-transformers, which would read its inputs "
        f"otherwise than in training",
        problems,
        advice="Use --format hf or merged, or train with the values in brackets.",
    )


def remark(settings: Mapping[str, Any]) -> str:
    """What users of the folder must do themselves, in a sentence; empty if nothing.

    That library cuts inputs with images, too, if it cuts at all, and then fails for them.
    """
    most = settings.get("max_len")
    if not most:
        return ""
    return (
        f"texts without an image were cut at {most} tokens, and are not by themselves in "
        f"sentence-transformers; where longer ones occur, encode them with "
        f'processing_kwargs={{"text": {{"max_length": {most}}}}} (and images without)'
    )


def write_files(
    folder: Path,
    form: SentenceTransformers,
    *,
    width: int,
    prompts: Mapping[str, str],
    settings: Mapping[str, Any],
) -> None:
    """Put the files beside a model's weights.

    Args:
      folder: a full model (adapters merged), tokenizer and processor files included.
      form: of the backbone.
      width: D.
      prompts: name -> text, as recorded in training.
      settings: of the model's processor, as `check_settings` has let through.

    Raises:
      UserError: if the image processor's file is needed, and there is none or it is no JSON.
    """
    kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": path,
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, (kind, path) in enumerate(kinds.items())
    ]
    _write(folder / "modules.json", modules)
    _write(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "__version__": {"sentence_transformers": VERSION},
            "prompts": {"query": "", "document": "", **_prompts(prompts)},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )
    method = {"method": "forward", "method_output_name": "last_hidden_state"}
    modalities: dict[str, Any] = {name: dict(method) for name in form.modalities}
    modalities["message"] = {**method, "format": "structured"}
    transformer: dict[str, Any] = {
        "transformer_task": "feature-extraction",
        "modality_config": modalities,
        "module_output_name": "token_embeddings",
    }
    if form.pillow:
        # Its newer spelling, backend="pil", reaches the video processor, which has no such one.
        transformer["processor_kwargs"] = {"use_fast": False}
    _write(folder / "sentence_bert_config.json", transformer)
    if form.pixel_limits:
        _write_pixel_limits(folder, settings["min_pixels"], settings["max_pixels"])
    _write(
        folder / "1_Pooling" / "config.json",
        {"embedding_dimension": width, "pooling_mode": "lasttoken", "include_prompt": True},
    )
    names = dict.fromkeys(("module_input_name", "module_output_name"), "sentence_embedding")
    _write(folder / "2_Normalize" / "config.json", names)
    image = form.wrapped if settings.get("image_markers") == "wrapped" else form.image
    around = form.conversations.get(settings.get("template", ""), ("", ""))
    said = settings.get("instruction", "")
    before, behind = (text.replace("{instruction}", said) for text in around)
    template = chat_template(image, before, behind)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    # The older place of the template, which some versions prefer, would say something else.
    (folder / "chat_template.json").unlink(missing_ok=True)


def _write_pixel_limits(folder: Path, least: int, most: int) -> None:
    """Put them where both generations of transformers read them."""
    limits = {
        "min_pixels": least,
        "max_pixels": most,
        "size": {"shortest_edge": least, "longest_edge": most},
    }
    file, nested = folder / "preprocessor_config.json", folder / "processor_config.json"
    done = file.exists()
    if done:
        _write(file, {**_read(file), **limits})
    if nested.exists():
        held = _read(nested)
        if isinstance(held.get("image_processor"), dict):
            _write(nested, {**held, "image_processor": {**held["image_processor"], **limits}})
            done = True
    if not done:
        raise UserError(
            f"the model has no {file.name}, which sentence-transformers needs to read images: "
            f"put the one of the published model into the base model's folder"
        )


def _read(file: Path) -> dict[str, Any]:
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file.name} cannot be read: {error}") from error
    if not isinstance(held, dict):
        raise UserError(f"{file.name} must hold an object")
    return held


def _prompts(prompts: Mapping[str, str]) -> dict[str, str]:
    """Our names and those of sentence-transformers: what we call target is a document there."""
    out = dict(prompts)
    if "target" in out:
        out.setdefault("document", out["target"])
    return out


def _write(file: Path, content: Any) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
