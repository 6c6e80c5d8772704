# SPDX-License-Identifier: Apache-2.0
"""The wrapper for mteb: its inputs, and, where mteb is installed, its scores against ours."""

import types

import numpy as np
import pytest
from evaluation_data import FakeEncoder
from PIL import Image

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.evaluation import corpus
from vlm2vec_jax.evaluation.mteb_encoder import MtebEncoder

COUNT = 12


class PixelEncoder(FakeEncoder):
    """The fake encoder for images in memory."""

    def encode(self, inputs, *, progress=False):
        self.seen += [i.text for i in inputs]
        return np.stack([self.vector(i.text, i.images) for i in inputs])

    def vector(self, text, images=()):
        seed = f"{text} {[np.asarray(i).tobytes().hex() for i in images]}"
        return super().vector(seed)


def picture(n: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(n).integers(0, 255, (4, 5, 3), np.uint8))


def metadata(prompt=None):
    return types.SimpleNamespace(name="Tiny", type="Any2AnyRetrieval", prompt=prompt)


def test_items_become_texts_with_markers():
    encoder = MtebEncoder(PixelEncoder(), "us/model")
    batch = {
        "text": ["a dog", None, "<|image_1|>\nverbatim\n", "words"],
        "image": [picture(0), picture(1), picture(2), None],
    }
    found = [item.text for item in encoder.inputs(batch, "Find it:")]
    assert found == [
        "<|image_1|> Find it: a dog", "<|image_1|> Find it:", "<|image_1|>\nverbatim\n",
        "Find it: words",
    ]  # fmt: skip
    found = [item.text for item in encoder.inputs(batch, "")]
    assert found[:2] == ["<|image_1|> a dog", "<|image_1|> Represent the given image."]
    titled = encoder.inputs({"text": ["body"], "title": ["Title"]}, "")
    assert [i.text for i in titled] == ["Title body"]
    for bad in ({"text": [None]}, {"text": [""], "audio": [1]}):
        with pytest.raises(UserError):
            encoder.inputs(bad, "")
    with pytest.raises(UserError, match="organisation/model"):
        MtebEncoder(PixelEncoder(), "model")


def test_the_instruction_is_the_most_particular_one():
    task = metadata({"query": "from the task"})
    encoder = MtebEncoder(PixelEncoder(), "us/model")
    assert encoder.instruction(task, "query") == "from the task"
    assert encoder.instruction(task, "document") == ""
    assert encoder.instruction(metadata("both"), "query") == "both"
    prompts = {"Tiny": "of the task", "query": "of queries"}
    assert MtebEncoder(None, "a/b", prompts=prompts).instruction(task, "query") == "of the task"
    assert MtebEncoder(None, "a/b", prompts={"query": ""}).instruction(task, "query") == ""


@pytest.mark.torch
def test_mteb_scores_a_small_task_as_we_do():
    mteb = pytest.importorskip("mteb")
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models.models_protocols import EncoderProtocol

    captions = [f"caption {n}" for n in range(COUNT)]
    pictures = [picture(n) for n in range(2 * COUNT)]

    class Tiny(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="TinyT2I", description="texts to images", reference=None, type="Any2AnyRetrieval",
            category="t2i", modalities=["text", "image"], eval_splits=["test"],
            eval_langs=["eng-Latn"], main_score="hit_rate_at_1", date=None, domains=None,
            dataset={"path": "none/none", "revision": "1"}, task_subtypes=None, license=None,
            annotations_creators=None, dialect=None, sample_creation=None, bibtex_citation=None,
            prompt={"query": "Find an image:"},
        )  # fmt: skip

        def load_data(self, *args, **kwargs):
            ids = [str(n) for n in range(COUNT)]
            queries = {"id": ids, "text": captions, "modality": ["text"] * COUNT}
            documents = {
                "id": [f"d{n}" for n in range(2 * COUNT)],
                "image": pictures,
                "modality": ["image"] * (2 * COUNT),
            }
            self.dataset = {
                "default": {
                    "test": {
                        "queries": Dataset.from_dict(queries),
                        "corpus": Dataset.from_dict(documents),
                        "relevant_docs": {i: {f"d{i}": 1} for i in ids},
                        "top_ranked": None,
                    }
                }
            }
            self.data_loaded = True

    encoder = PixelEncoder(width=3)
    model = MtebEncoder(encoder, "us/model")
    assert isinstance(model, EncoderProtocol)
    result = mteb.evaluate(model, Tiny(), cache=None, show_progress_bar=False)
    scores = result.task_results[0].scores["test"][0]
    assert "Find an image: caption 3" in encoder.seen

    queries = np.stack([encoder.vector(f"Find an image: {c}") for c in captions])
    marker = "<|image_1|> Represent the given image."
    documents = np.stack([encoder.vector(marker, [p]) for p in pictures])
    ours = corpus.rank(queries, documents, [[n] for n in range(COUNT)]).metrics()
    for k in (1, 5, 10):
        assert scores[f"hit_rate_at_{k}"] == pytest.approx(ours[f"hit@{k}"], abs=1e-4)
        assert scores[f"ndcg_at_{k}"] == pytest.approx(ours[f"ndcg_linear@{k}"], abs=1e-4)
        assert scores[f"recall_at_{k}"] == pytest.approx(ours[f"recall@{k}"], abs=1e-4)
        assert scores[f"precision_at_{k}"] == pytest.approx(ours[f"precision@{k}"], abs=1e-4)
    assert scores["main_score"] == pytest.approx(ours["hit@1"], abs=1e-4)
