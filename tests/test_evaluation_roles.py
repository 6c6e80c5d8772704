# SPDX-License-Identifier: Apache-2.0
"""Encoders that tell queries from targets, and instructions on targets chosen for an evaluation."""

import json
import sys

import numpy as np
import pytest
from evaluation_data import FakeEncoder, captions, labels, row, write_image, write_subset

from vlm2vec_jax import evaluate, flags
from vlm2vec_jax.data.mmeb import open_eval
from vlm2vec_jax.data.target_instruction import WORDS
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.evaluation import flickr, merge, run
from vlm2vec_jax.evaluation import inputs as listing
from vlm2vec_jax.evaluation.encoders import SavedVectors
from vlm2vec_jax.evaluation.endpoint import Endpoint


class Roles(FakeEncoder):
    """Embeds a query otherwise than the same thing as a target."""

    tells_roles = True

    def encode(self, inputs, roles, *, progress=False):
        self.calls += 1
        self.seen += [(role, item.text, *item.images) for role, item in zip(roles, inputs)]
        vectors = [self.vector(f"{r}: {i.text}", i.images) for r, i in zip(roles, inputs)]
        return np.stack(vectors)


@pytest.fixture
def data(tmp_path):
    """Labels that look for labels, among others themselves; and captions that look for images."""
    names = [f"label {k}" for k in range(6)]
    rows = [row((n, ""), *[(m, "") for m in names[k:] + names[:k]]) for k, n in enumerate(names)]
    write_subset(tmp_path / "data", "MyLabels", rows)
    write_subset(tmp_path / "data", "MSCOCO_t2i", captions())
    return tmp_path / "data"


def test_what_is_query_and_target_is_embedded_as_both(data, tmp_path):
    encoder = Roles()
    run.evaluate(encoder, data, output=tmp_path / "out")
    assert len(encoder.seen) == len(set(encoder.seen)) == 6 + 6 + 5 + 7
    assert ("query", "label 3") in encoder.seen and ("target", "label 3") in encoder.seen
    for source in open_eval(data):
        lines = (tmp_path / "out" / f"{source.subset}_pred.jsonl").read_text().splitlines()
        for one, line in zip(source, map(json.loads, lines), strict=True):
            query, *targets = (
                encoder.vector(f"{role}: {text}", [source.image_root / path] if path else [])
                for role, (text, path) in (
                    ("query", one.query_key), *(("target", key) for key in one.target_keys)
                )
            )  # fmt: skip
            scores = [query @ t / np.linalg.norm(query) / np.linalg.norm(t) for t in targets]
            assert line["score"] == pytest.approx(max(scores), abs=1e-6)
            text, path = one.target_keys[int(np.argmax(scores))]
            assert line["predicted"] == {"text": text, "image": path}
    again = Roles()
    found = run.evaluate(again, data, output=tmp_path / "out")
    assert not again.seen
    for k in range(2):
        run.evaluate(Roles(), data, output=tmp_path / f"part{k}", shard=(k, 2))
    assert merge.merge([tmp_path / "part0", tmp_path / "part1"], tmp_path / "merged") == found
    with pytest.raises(UserError, match="queries apart from those of targets"):
        SavedVectors(tmp_path / "out" / "MyLabels_embeddings.npz", data)


def test_a_callable_with_a_parameter_for_it_is_told(data, tmp_path, monkeypatch):
    (tmp_path / "told.py").write_text(
        "from test_evaluation_roles import Roles\n"
        "def encode(inputs, roles):\n"
        "    return Roles().encode(inputs, roles)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "test_evaluation_roles", sys.modules[__name__])
    argv = ["evaluate", "--encoder", "told:encode", "--data", str(data), "--output"]
    assert flags.call(evaluate.main, evaluate.define, [*argv, str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out/scores.json").read_text())
    expected = run.evaluate(Roles(), data, output=tmp_path / "plain")
    assert found["subsets"] == expected["subsets"]


def test_input_types_of_a_server():
    def types(form, *given):
        made = Endpoint("http://h", "m", form=form, input_type=given)
        return made.tells_roles, made.fingerprint().get("input_type")

    assert types("cohere") == (True, ["search_query", "search_document"])
    assert types("cohere", "clustering") == (False, ["clustering"])
    assert types("messages") == (False, None)
    assert types("input", "query", "passage") == (True, ["query", "passage"])
    for wrong in (("a", "b", "c"), ("a", "")):
        with pytest.raises(UserError, match="--endpoint_input_type"):
            types("cohere", *wrong)


def test_flickr_looks_both_ways_with_both(tmp_path):
    pictures = []
    for n in range(4):
        write_image(tmp_path / f"{n}.png")
        pictures.append(flickr.Picture(f"{n}.png", tmp_path / f"{n}.png", (f"a {n}", f"b {n}")))
    encoder = Roles(width=2)
    found = flickr.run_flickr(encoder, pictures, tmp_path / "out")
    assert encoder.seen.count(("query", "a 1")) == encoder.seen.count(("target", "a 1")) == 1
    assert len(encoder.seen) == 2 * (4 + 8)

    def unit(role, text, *images):
        vector = encoder.vector(f"{role}: {text}", images)
        return vector / np.linalg.norm(vector)

    images = {r: [unit(r, flickr.PROMPT, p.path) for p in pictures] for r in ("query", "target")}
    texts = {r: [unit(r, c) for p in pictures for c in p.captions] for r in ("query", "target")}
    to_text = np.argmax(np.stack(images["query"]) @ np.stack(texts["target"]).T, axis=1) // 2
    to_image = np.argmax(np.stack(texts["query"]) @ np.stack(images["target"]).T, axis=1)
    assert found["image_to_text"]["recall@1"] == np.mean(to_text == np.arange(4))
    assert found["text_to_image"]["recall@1"] == np.mean(to_image == np.arange(8) // 2)


# --------------------------------------------------------------------- instructions on the targets


class Instructed(FakeEncoder):
    target_instruction = "task"


@pytest.mark.parametrize(("given", "words"), [(None, "task"), ("", ""), ("Say: ", "Say:")])
def test_the_instruction_of_the_model_or_another(tmp_path, given, words):
    write_subset(tmp_path / "data", "ImageNet-1K", labels())
    encoder, said = Instructed(), []
    found = run.evaluate(
        encoder, tmp_path / "data", output=tmp_path / "out", target_instruction=given,
        say=said.append,
    )  # fmt: skip
    front = {"task": f"{WORDS['classification']} ", "": "", "Say:": "Say: "}[words]
    targets = {text for text, images in encoder.seen if not images}
    assert targets == {f"{front}label {k}" for k in range(6)}
    assert found["target_instruction"] == ("task" if given is None else given)
    told = {"task": "as in this model's training", "": "without the instruction",
            "Say:": "as was asked for"}[words]  # fmt: skip
    assert any(told in line for line in said)


def test_listed_inputs_have_it_and_their_vectors_are_found(tmp_path):
    write_subset(data := tmp_path / "data", "ImageNet-1K", labels())
    given = ["--data", str(data), "--target_instruction", "task"]
    argv = ["inputs", *given, "--output", str(tmp_path / "in.jsonl")]
    assert flags.call(listing.main, listing.define, argv) == 0
    rows = [json.loads(line) for line in (tmp_path / "in.jsonl").read_text().splitlines()]
    assert sum(r["text"].startswith(WORDS["classification"]) for r in rows) == 6
    matrix = [FakeEncoder().vector(r["text"], [data / i for i in r["images"]]) for r in rows]
    np.savez(tmp_path / "in.npz", embeddings=np.stack(matrix))
    argv = ["evaluate", "--vectors", str(tmp_path / "in.npz"), "--output", str(tmp_path / "out")]
    assert flags.call(evaluate.main, evaluate.define, [*argv, *given]) == 0
    assert flags.call(evaluate.main, evaluate.define, [*argv, *given[:2]]) == 2
