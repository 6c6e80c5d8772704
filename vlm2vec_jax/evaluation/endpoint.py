# SPDX-License-Identifier: Apache-2.0
"""An embedding server as an encoder: `/v1/embeddings` as OpenAI and vLLM have it, or `/v2/embed`.

Three bodies are known:
  messages  POST {"model", "messages": [conversation]} for each input, as vLLM takes images;
  input     POST {"model", "input": [...]}: texts as strings, several to a request, and inputs with
            images as chat messages;
  cohere    POST {"model", "inputs": [{"content": [...]}]}, several to a request (`/v2/embed`).

Where the server embeds queries and documents differently, each input is sent as what it is:
`input_type` is the pair of words for it (Cohere's by default in its form; in the other two only if
given, as some servers of `/v1/embeddings` take it). An input of both kinds is then embedded twice.

In all of them an image stands between the pieces of text where its marker stood, as a data URI; the
space behind a marker, which templates add themselves, is left out. Everything else of a text is
sent verbatim, trailing newlines included.
"""

from __future__ import annotations

import base64
import concurrent.futures
import http.client
import io
import json
import mimetypes
import os
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.evaluation import store
from vlm2vec_jax.images import load_image
from vlm2vec_jax.inputs import IMAGE_MARKER, ImageLike, MultimodalInput, raise_bad_inputs

FORMATS = ("messages", "input", "cohere")
AS_THEY_ARE = {"image/png", "image/jpeg", "image/webp", "image/gif"}
"""Files of these types are sent byte for byte; others as PNG."""

INPUT_TYPES = {"cohere": ("search_query", "search_document")}
"""What a query and a target are called, by form, where nobody says otherwise."""

RETRIED = {408, 409, 425, 429, 500, 502, 503, 504}
LONGEST_PAUSE = 60.0


class Endpoint:
    """A server behind the evaluator's protocol.

    Attributes:
      tells_roles: whether queries are sent otherwise than targets.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        form: str = "messages",
        api_key: str | None = None,
        dimensions: int | None = None,
        batch_size: int = 16,
        workers: int = 8,
        timeout_s: float = 120.0,
        retries: int = 5,
        input_type: Sequence[str] = (),
        pause_s: float = 1.0,
        say: Callable[[str], None] = lambda message: None,
    ):
        """Nothing is asked yet.

        Args:
          url: of the endpoint; `/v1/embeddings` or `/v2/embed` is added to a bare host.
          model: the name that the server knows.
          form: one of `FORMATS`.
          api_key: sent as a bearer token.
          dimensions: ask for so many, and refuse answers of any other number.
          batch_size: inputs of a request where the format takes several.
          workers: requests at a time.
          timeout_s: of a request, in seconds.
          retries: how often a request is repeated that failed for a reason that may pass.
          input_type: what to call a query and a target, or one word for both; by default what
            `INPUT_TYPES` has for the form.
          pause_s: before the first repetition; doubled each time.
          say: receives a line when the server has to be asked again.

        Raises:
          UserError: an unknown format, a URL that is none, or more than two input types.
        """
        if form not in FORMATS:
            raise UserError(f"format {form!r} is not known; known: {', '.join(FORMATS)}")
        kinds = tuple(input_type) or INPUT_TYPES.get(form, ())
        if len(kinds) > 2 or not all(kinds):
            raise UserError(
                f"--endpoint_input_type {','.join(kinds)}: one word for all inputs, or one for "
                f"queries and one for targets"
            )
        self.input_types: dict[str, str] = {}
        if kinds:
            self.input_types = {store.QUERY: kinds[0], store.TARGET: kinds[-1]}
        self.tells_roles = len(set(kinds)) > 1
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UserError(f"--endpoint {url!r}: write http://HOST:PORT or https://HOST")
        if parts.path in ("", "/"):
            path = "/v2/embed" if form == "cohere" else "/v1/embeddings"
            url = urllib.parse.urlunsplit(parts._replace(path=path))
        self.url, self.model, self.form = url, model, form
        self.dimensions, self.batch_size, self.workers = dimensions, batch_size, workers
        self.timeout_s, self.retries, self.pause_s = timeout_s, retries, pause_s
        self.say, self._key = say, api_key

    def fingerprint(self) -> dict[str, Any]:
        """The server, the model and what is asked of it; the key is not part of it."""
        named: dict[str, Any] = {"endpoint": self.url, "model": self.model, "format": self.form}
        if self.dimensions:
            named["dimensions"] = self.dimensions
        if self.input_types:
            named["input_type"] = list(dict.fromkeys(self.input_types.values()))
        return named

    def encode(
        self,
        inputs: Sequence[MultimodalInput],
        roles: Sequence[str] | None = None,
        **options: Any,
    ) -> np.ndarray:
        """Ask for all embeddings, several requests at a time; float32 [N, D].

        Args:
          inputs: what to embed.
          roles: `store.QUERY` or `store.TARGET` for each; targets if not given.
          options: of other encoders, not used.

        Raises:
          BadInputs: images that cannot be read.
          UserError: the server cannot be reached, refuses, or answers with something else than
            one vector of the right length for each input.
        """
        del options
        inputs = list(inputs)
        roles = roles or [store.TARGET] * len(inputs)
        batches = self._batches(roles)
        out: list[np.ndarray | None] = [None] * len(inputs)
        with concurrent.futures.ThreadPoolExecutor(self.workers) as pool:
            futures = [
                pool.submit(self._ask, [inputs[n] for n in batch], roles[batch[0]])
                for batch in batches
            ]
            problems: dict[int, str] = {}
            try:
                for batch, future in zip(batches, futures, strict=True):
                    vectors, bad = future.result()
                    problems |= {batch[k]: reason for k, reason in bad.items()}
                    for n, vector in zip(batch, vectors, strict=False):
                        out[n] = vector
            except BaseException:
                for future in futures:
                    future.cancel()
                raise
        raise_bad_inputs("some inputs cannot be read", problems)
        widths = sorted({len(v) for v in out if v is not None})
        if len(widths) > 1:
            raise UserError(f"{self.url} gave vectors of different lengths: {widths}")
        if not inputs:
            return np.zeros((0, self.dimensions or 0), np.float32)
        return np.stack([v for v in out if v is not None])

    def _batches(self, roles: Sequence[str]) -> list[list[int]]:
        """Numbers of inputs of one role to a request."""
        size = 1 if self.form == "messages" else self.batch_size
        batches = []
        for role in dict.fromkeys(roles):
            own = [n for n, one in enumerate(roles) if one == role]
            batches += [own[k : k + size] for k in range(0, len(own), size)]
        return batches

    def _ask(
        self, items: Sequence[MultimodalInput], role: str
    ) -> tuple[list[np.ndarray], dict[int, str]]:
        contents, problems = [], {}
        for n, item in enumerate(items):
            try:
                contents.append(_content(item))
            except (UserError, OSError) as error:
                problems[n] = str(error)
        if problems:
            return [], problems
        answer = self._post(self._body(contents, role))
        vectors = _vectors(answer, self.form)
        if vectors is None or len(vectors) != len(items):
            found = "no embeddings" if vectors is None else f"{len(vectors)} embeddings"
            raise UserError(f"{self.url} answered with {found} for {len(items)} input(s)")
        for vector in vectors:
            if vector.ndim != 1 or not len(vector):
                raise UserError(f"{self.url} answered with a vector of shape {vector.shape}")
            if self.dimensions and len(vector) != self.dimensions:
                raise UserError(
                    f"{self.url} gave vectors of {len(vector)} dimensions, not the "
                    f"{self.dimensions} that were asked for"
                )
        return vectors, {}

    def _body(self, contents: Sequence[list[dict[str, Any]]], role: str) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.model}
        if self.input_types:
            body["input_type"] = self.input_types[role]
        if self.form == "cohere":
            body |= {
                "inputs": [{"content": content} for content in contents],
                "embedding_types": ["float"],
            }
            return body | ({"output_dimension": self.dimensions} if self.dimensions else {})
        body["encoding_format"] = "float"
        if self.dimensions:
            body["dimensions"] = self.dimensions
        if self.form == "messages":
            return body | {"messages": [{"role": "user", "content": contents[0]}]}
        plain = all(len(c) == 1 and c[0]["type"] == "text" for c in contents)
        if plain:
            return body | {"input": [content[0]["text"] for content in contents]}
        return body | {"input": [[{"role": "user", "content": content}] for content in contents]}

    def _post(self, body: dict[str, Any]) -> Any:
        """The answer to a request, asked again where the reason for a failure may pass."""
        data = json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        for attempt in range(self.retries + 1):
            pause = min(self.pause_s * 2**attempt, LONGEST_PAUSE)
            try:
                request = urllib.request.Request(self.url, data, headers, method="POST")
                with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {error.reason}: {_message(error)}".rstrip(": ")
                if error.code not in RETRIED:
                    raise UserError(f"{self.url} refused: {reason}") from None
                pause = max(pause, _retry_after(error))
            except ValueError:
                raise UserError(
                    f"{self.url} did not answer with JSON; is it the endpoint?"
                ) from None
            except (OSError, http.client.HTTPException) as error:
                inner = getattr(error, "reason", error)
                timed_out = isinstance(inner, (TimeoutError, socket.timeout))
                reason = f"no answer within {self.timeout_s:g} s" if timed_out else str(inner)
            if attempt < self.retries:
                self.say(f"{self.url}: {reason}; asked again in {pause:g} s")
                time.sleep(pause)
        raise UserError(f"{self.url} failed {self.retries + 1} times, at last: {reason}")


def _content(item: MultimodalInput) -> list[dict[str, Any]]:
    """Text and images as the parts of a chat message."""
    if not item.images:
        return [{"type": "text", "text": item.text}]
    problem = item.problem()
    if problem:
        raise UserError(problem)
    parts: list[dict[str, Any]] = []
    pieces = IMAGE_MARKER.split(item.text)  # text, number, text, number, text ...
    for k, piece in enumerate(pieces):
        if k % 2:
            url = _data_uri(item.images[int(piece) - 1])
            parts.append({"type": "image_url", "image_url": {"url": url}})
            continue
        words = piece.removeprefix(" ") if k else piece
        if words:
            parts.append({"type": "text", "text": words})
    return parts


def _data_uri(image: ImageLike) -> str:
    """An image's file as it is if any server can read it, otherwise as PNG."""
    if not isinstance(image, Image.Image):
        kind = mimetypes.guess_type(os.fspath(image))[0]
        decoded = load_image(image)  # whatever is wrong with it is said here
        if kind in AS_THEY_ARE:
            return f"data:{kind};base64,{base64.b64encode(Path(image).read_bytes()).decode()}"
    else:
        decoded = load_image(image)
    out = io.BytesIO()
    decoded.save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def _vectors(answer: Any, form: str) -> list[np.ndarray] | None:
    """The vectors of an answer in the order of the inputs, None if it is of another form."""
    try:
        if form == "cohere":
            return [np.asarray(v, np.float32) for v in answer["embeddings"]["float"]]
        rows = sorted(answer["data"], key=lambda row: row["index"])
        if [row["index"] for row in rows] != list(range(len(rows))):
            return None
        return [_vector(row["embedding"]) for row in rows]
    except (KeyError, TypeError, ValueError):
        return None


def _vector(value: Any) -> np.ndarray:
    """Numbers, or little-endian float32 in base64."""
    if isinstance(value, str):
        return np.frombuffer(base64.b64decode(value), "<f4")
    return np.asarray([np.nan if v is None else v for v in value], np.float32)


def _message(error: urllib.error.HTTPError) -> str:
    """What the server says went wrong, in one line."""
    try:
        text = error.read(2000).decode(errors="replace")
    except OSError:
        return ""
    try:
        value = json.loads(text)
        inner = value.get("error", value.get("message", value.get("detail", text)))
        text = inner.get("message", text) if isinstance(inner, dict) else str(inner)
    except (ValueError, AttributeError):
        pass
    return " ".join(text.split())[:300]


def _retry_after(error: urllib.error.HTTPError) -> float:
    """Seconds that the server asks to wait, 0 if it does not say."""
    try:
        return min(max(float(error.headers.get("Retry-After", 0)), 0.0), LONGEST_PAUSE)
    except ValueError:
        return 0.0
