# SPDX-License-Identifier: Apache-2.0
"""Text to token ids by a folder's `tokenizer.json`: the one place that loads a tokenizer.

The ids follow `tokenizer.json` exactly, through the `tokenizers` library. Current transformers
rebuilds a Llama tokenizer's pipeline from its vocabulary, which gives other ids; what is copied
here is how transformers 4.46 (the reference's) wraps the file: which added tokens it registers,
who puts `<s>` in front, and how it truncates.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm2vec_jax.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LLAMA_CLASSES = frozenset({"LlamaTokenizer", "LlamaTokenizerFast"})
# transformers writes 1e30 where there is no limit, and does not truncate above 1e20.
_NO_LIMIT = 1e20
_REMEMBERED = 8192
"""Texts whose ids are kept: each is measured before rows are planned and encoded afterwards, and
words around images are often the same."""
_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


class TextTokenizer:
    """A tokenizer that never pads, and truncates only when asked to.

    Thread-safe: nothing in it changes after construction.

    Attributes:
      hash: sha256 (hex) of `tokenizer.json`.
      model_max_length: the limit of `tokenizer_config.json`; None where it states none.
      special_tokens: how many ids every text gets in addition (1 with `<s>` in front).
      truncation_side: `right` or `left`.
    """

    def __init__(
        self,
        backend: Tokenizer,
        *,
        hash: str,
        model_max_length: int | None = None,
        truncation_side: str = "right",
    ):
        # Saved settings of whoever trained the tokenizer would cut or fill texts unasked.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.hash = hash
        self.model_max_length = model_max_length
        self.truncation_side = truncation_side
        self.special_tokens = backend.num_special_tokens_to_add(False)
        self._ids = functools.lru_cache(_REMEMBERED)(self._ids_of)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is remembered: sent to the processes that decode images."""
        return {name: value for name, value in vars(self).items() if name != "_ids"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._ids = functools.lru_cache(_REMEMBERED)(self._ids_of)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def token(self, number: int) -> str | None:
        """The text of an id; None if there is no such id."""
        return self._backend.id_to_token(number)

    def encode(self, text: str, max_len: int | None = None, *, truncate: bool = True) -> list[int]:
        """Token ids of a text, special tokens included.

        Args:
          text: any string; an empty one gives the special tokens alone.
          max_len: the most ids to return, special tokens counted; None means the model's own
            limit. As in transformers, the text gives way and the special tokens stay.
          truncate: False returns every id, whatever the limits.

        Raises:
          UserError: if the text is not valid Unicode, or `max_len` has no room for the special
            tokens.
        """
        ids = list(self._ids(text))
        limit = self.model_max_length if max_len is None else max_len
        if not truncate or limit is None or len(ids) <= limit:
            return ids
        room = limit - self.special_tokens
        if room < 0:
            raise UserError(f"max_len={limit} has no room for {self.special_tokens} special tokens")
        encoding = self._backend.encode(text, add_special_tokens=False)
        encoding.truncate(room, direction=self.truncation_side)
        return self._backend.post_process(encoding).ids

    def _ids_of(self, text: str) -> tuple[int, ...]:
        try:
            return tuple(self._backend.encode(text).ids)
        except TypeError as error:
            raise UserError(f"not a valid Unicode text: {text!r:.80}") from error


def load_tokenizer(
    folder: str | os.PathLike, *, tokenizer_class: str | None = None
) -> TextTokenizer:
    """Load the tokenizer of a model folder.

    Args:
      folder: holds `tokenizer.json`, and `tokenizer_config.json` beside it (without one, the
        defaults of transformers 4.46 hold).
      tokenizer_class: the class that transformers would make of it; None reads it from
        `tokenizer_config.json`. It decides who adds `<s>`: Llama classes follow
        `add_bos_token` (default true) and `add_eos_token` (default false) and nothing else, all
        others follow the post-processor in `tokenizer.json`.

    Raises:
      UserError: if there is no `tokenizer.json`, or a file cannot be read, or the begin or end
        token that shall be added is not in the vocabulary.
    """
    from tokenizers import Tokenizer  # late: training from prepared ids needs no tokenizer

    folder = Path(folder)
    path = folder / "tokenizer.json"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(_missing(folder, error)) from error
    try:
        backend = Tokenizer.from_str(data.decode("utf-8"))
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"{path} is not a tokenizer that `tokenizers` reads: {error}") from error
    config = read_json(folder / "tokenizer_config.json")
    names = {**read_json(folder / "special_tokens_map.json"), **config}
    llama = (tokenizer_class or config.get("tokenizer_class")) in LLAMA_CLASSES
    _register_added_tokens(backend, config, names, llama, path)
    if llama:
        _rebuild_llama_template(backend, config, names, path)
    return TextTokenizer(
        backend,
        hash=hashlib.sha256(data).hexdigest(),
        model_max_length=_limit(config.get("model_max_length"), folder),
        truncation_side=_side(config.get("truncation_side", "right"), folder),
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; {} when the file is not there.

    Raises:
      UserError: if the file is there and holds no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def _missing(folder: Path, error: OSError) -> str:
    if not folder.is_dir():
        return f"no folder {folder} to load a tokenizer from"
    if (folder / "tokenizer.model").exists():
        return (
            f"{folder} has only a SentencePiece tokenizer.model, and tokenizer.json is needed. "
            f"Write one where transformers and sentencepiece are installed: "
            f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    if not (folder / "tokenizer.json").exists():
        return f"{folder} has no tokenizer.json; copy it from the base model's folder"
    return f"{folder / 'tokenizer.json'} cannot be read: {error.strerror}"


def _name(names: dict[str, Any], key: str, default: str | None) -> str | None:
    """A special token's text; the files write it as a string or as an object."""
    value = names.get(key, default)
    return value.get("content") if isinstance(value, dict) else value


def _register_added_tokens(
    backend: Tokenizer,
    config: dict[str, Any],
    names: dict[str, Any],
    llama: bool,
    path: Path,
) -> None:
    """Add what `tokenizer_config.json` adds to `tokenizer.json`, as transformers 4.46 does.

    A token listed there with other flags (say, `rstrip`) replaces the one in `tokenizer.json`,
    and a special token that is only a piece of the vocabulary becomes one that is matched in text.
    """
    from tokenizers import AddedToken

    config_path = path.parent / "tokenizer_config.json"
    listed = config.get("added_tokens_decoder", {})
    try:
        listed = {int(k): dict(v, content=str(v["content"])) for k, v in listed.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{config_path}: added_tokens_decoder is malformed ({error!r})") from error
    for key, fields in sorted(listed.items()):
        flags = {flag: bool(fields.get(flag, False)) for flag in _TOKEN_FLAGS}
        token = AddedToken(fields["content"], special=bool(fields.get("special", False)), **flags)
        add = backend.add_special_tokens if token.special else backend.add_tokens
        add([token])
        found = backend.token_to_id(token.content)
        if found != key:
            raise UserError(
                f"{config_path} gives {token.content!r} the id {key}, "
                f"tokenizer.json {found}; the two files do not belong together"
            )
    defaults = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"} if llama else {}
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        name = _name(names, key, defaults.get(key))
        if name and name not in known and backend.token_to_id(name) is not None:
            backend.add_special_tokens([AddedToken(name, special=True, normalized=False)])


def _rebuild_llama_template(
    backend: Tokenizer, config: dict[str, Any], names: dict[str, Any], path: Path
) -> None:
    """Put `<s>` in front (and `</s>` behind) by the flags of `tokenizer_config.json` alone."""
    from tokenizers.processors import TemplateProcessing

    special: list[tuple[str, int]] = []

    def piece(flag: str, default: bool, key: str, fallback: str) -> list[str]:
        if not config.get(flag, default):
            return []
        token = _name(names, key, fallback)
        number = None if token is None else backend.token_to_id(token)
        if token is None or number is None:
            raise UserError(
                f"{path}: {flag} is on, but {key} ({token!r}) is not in the vocabulary; "
                f"set {flag} or {key} in tokenizer_config.json"
            )
        special.append((token, number))
        return [f"{token}:0"]

    begin = piece("add_bos_token", True, "bos_token", "<s>")
    end = piece("add_eos_token", False, "eos_token", "</s>")
    # A property of the Rust object; its stub does not say that it can be set.
    backend.post_processor = TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=" ".join([*begin, "$A:0", *end]), special_tokens=special
    )


def _limit(value: Any, folder: Path) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 1:
        raise UserError(f"{folder}: model_max_length must be a positive number, not {value!r}")
    return None if value > _NO_LIMIT else int(value)


def _side(value: Any, folder: Path) -> str:
    if value not in ("right", "left"):
        raise UserError(f"{folder}: truncation_side must be right or left, not {value!r}")
    return value
