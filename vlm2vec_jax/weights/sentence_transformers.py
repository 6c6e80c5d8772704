# SPDX-License-Identifier: Apache-2.0
"""The files that make a model folder one that sentence-transformers loads, images included.

The forms are those of sentence-transformers 6.2 that 5 and vLLM read as well: module types in
their older spelling, pooling of the last token, normalisation, a modality `message` (without it a
text with an image is refused), and a chat template that joins parts without any marks of turns,
because VLM2Vec models were trained on plain prompts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VERSION = "6.2.0"
"""Of sentence-transformers, whose forms these are; an older one says so when it loads them."""


@dataclasses.dataclass(frozen=True)
class SentenceTransformers:
    """What a backbone says about itself for this form.

    Attributes:
      image: text that stands for an image in the model's prompts, as `<|image_pad|>`.
      modalities: what it takes, besides messages.
    """

    image: str
    modalities: tuple[str, ...] = ("text", "image")


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
{%- if seen.images -%}
{{- IMAGE * seen.images -}}
{%- if seen.text and seen.text[0] not in ' \\n\\t' -%}{{- ' ' -}}{%- endif -%}
{%- endif -%}
{{- seen.text -}}
"""


def chat_template(image: str) -> str:
    """The raw template (jinja): images, then prompt, then text; nothing of a conversation.

    One space parts images from a text that does not begin with one.
    """
    return _TEMPLATE.replace("IMAGE", json.dumps(image))


def write_files(
    folder: Path, form: SentenceTransformers, *, width: int, prompts: Mapping[str, str]
) -> None:
    """Put the files beside a model's weights.

    Args:
      folder: a full model (adapters merged), tokenizer and processor files included.
      form: of the backbone.
      width: D.
      prompts: name -> text, as recorded in training.
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
    _write(
        folder / "sentence_bert_config.json",
        {
            "transformer_task": "feature-extraction",
            "modality_config": modalities,
            "module_output_name": "token_embeddings",
        },
    )
    _write(
        folder / "1_Pooling" / "config.json",
        {"embedding_dimension": width, "pooling_mode": "lasttoken", "include_prompt": True},
    )
    names = dict.fromkeys(("module_input_name", "module_output_name"), "sentence_embedding")
    _write(folder / "2_Normalize" / "config.json", names)
    (folder / "chat_template.jinja").write_text(chat_template(form.image), encoding="utf-8")
    # The older place of the template, which some versions prefer, would say something else.
    (folder / "chat_template.json").unlink(missing_ok=True)


def _prompts(prompts: Mapping[str, str]) -> dict[str, str]:
    """Our names and those of sentence-transformers: what we call target is a document there."""
    out = dict(prompts)
    if "target" in out:
        out.setdefault("document", out["target"])
    return out


def _write(file: Path, content: Any) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
