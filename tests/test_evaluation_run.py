# SPDX-License-Identifier: Apache-2.0
"""The evaluation: results on disk, inputs embedded once, what a score is made of."""

import itertools
import json
import os

import numpy as np
import pytest
from evaluation_data import FakeEncoder, evaluate, labels, row, two_subsets, write_subset

from vlm2vec_jax.data.mmeb import open_eval
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.evaluation import metrics, run, scoring
from vlm2vec_jax.evaluation.embedding import plan_subset
from vlm2vec_jax.evaluation.hosts import share
from vlm2vec_jax.evaluation.rows import Settings


@pytest.fixture
def data(tmp_path):
    return two_subsets(tmp_path / "data")


def test_results_follow_the_contract(data, tmp_path):
    encoder, output = FakeEncoder(), tmp_path / "out"
    found, _ = evaluate(encoder, data, output)
    assert sorted(os.listdir(output)) == sorted(
        [f"{s}_{kind}" for s in ("ImageNet-1K", "MSCOCO_t2i")
         for kind in ("embeddings.npz", "pred.jsonl", "score.json")]
        + ["scores.json", "scores.md"]
    )  # fmt: skip
    assert json.loads((output / "scores.json").read_text()) == found
    for name, task, rows in (("ImageNet-1K", "classification", 6), ("MSCOCO_t2i", "retrieval", 5)):
        score = json.loads((output / f"{name}_score.json").read_text())
        assert score["num_pred"] == rows
        assert score["acc"] == score["num_correct"] / rows
        subset = found["subsets"][name]
        assert (subset["acc"], subset["meta_task"], subset["split"]) == (score["acc"], task, "ind")
    assert set(found["averages"]) == {
        "classification", "vqa", "retrieval", "grounding", "ind", "ood", "all"
    }  # fmt: skip
    assert found["averages"]["vqa"] is None and found["averages"]["ood"] is None
    accuracies = [s["acc"] for s in found["subsets"].values()]
    assert found["averages"]["all"] == pytest.approx(np.mean(accuracies))
    assert found["fingerprint"]["encoder"] == encoder.fingerprint()


def test_predictions_agree_with_a_loop_over_rows(data, tmp_path):
    encoder, output = FakeEncoder(), tmp_path / "out"
    evaluate(encoder, data, output)
    for source in open_eval(data, []):
        lines = (output / f"{source.subset}_pred.jsonl").read_text().splitlines()
        assert len(lines) == len(source)
        for n, line in enumerate(map(json.loads, lines)):
            vectors = [
                encoder.vector(text, [source.image_root / path] if path else [])
                for text, path in (source[n].query_key, *source[n].target_keys)
            ]
            unit = [v / np.linalg.norm(v) for v in vectors]
            scores = np.array([unit[0] @ t for t in unit[1:]])
            best = int(np.argmax(scores))
            assert line["row"] == n and line["correct"] == (best == 0)
            text, path = source[n].target_keys[best]
            assert line["predicted"] == {"text": text, "image": path}
            assert line["truth"]["text"] == source[n].target_keys[0][0]
            assert line["query"]["text"] == source[n].query_key[0]
            assert line["score"] == pytest.approx(scores[best], abs=1e-6)
            assert line["rank"] == 1 + int((scores > scores[0]).sum())
            assert line["candidates"] == len(scores)
            assert len(line["top"]) == min(scoring.TOP, len(scores))
            assert [t["truth"] for t in line["top"]].count(True) <= 1
            ordered = [t["score"] for t in line["top"]]
            assert ordered == sorted(ordered, reverse=True)


@pytest.mark.parametrize("at_once", [1, 512])
def test_every_input_is_embedded_once_over_all_subsets(data, tmp_path, at_once):
    # The same pictures and labels in a second subset, one of them by another spelling of its path,
    # the others copies in a folder of its own, as MMEB has them.
    rows = labels()
    for n, one in enumerate(rows):
        one["qry_img_path"] = f"{'own' if n else 'img/../img'}/ImageNet-1K_{n}.png"
    write_subset(data, "VOC2007", rows)
    encoder = FakeEncoder()
    found, said = evaluate(encoder, data, tmp_path / "out", inputs_at_once=at_once)
    assert len(encoder.seen) == len(set(encoder.seen))
    assert encoder.calls == (2 if at_once == 1 else 1)
    assert found["subsets"]["VOC2007"]["acc"] == found["subsets"]["ImageNet-1K"]["acc"]
    assert any("VOC2007" in s and "0 inputs to embed (12 more are shared" in s for s in said)


def test_vectors_that_are_not_finite_are_counted_wrong_and_told(data, tmp_path):
    class Broken(FakeEncoder):
        def encode(self, inputs, *, progress=False):
            return np.full((len(inputs), 4), np.nan, np.float32)

    found, said = evaluate(Broken(), data, tmp_path / "out")
    assert found["averages"]["all"] == 0.0
    assert found["subsets"]["ImageNet-1K"]["acc_reference"] == 1.0
    assert any("24 of 24 embeddings for ImageNet-1K, MSCOCO_t2i are not finite" in s for s in said)
    assert any("reference counts ties" in s for s in said)
    score = json.loads((tmp_path / "out" / "ImageNet-1K_score.json").read_text())
    assert score["num_not_finite"] == 6


def test_a_subset_of_ones_own_counts_in_all_only(data, tmp_path):
    write_subset(data, "MyShop", [row(("a\n", ""), ("b", ""), ("c", ""))])
    found, said = evaluate(FakeEncoder(), data, tmp_path / "out")
    mine = found["subsets"]["MyShop"]
    assert (mine["meta_task"], mine["split"]) == ("other", None)
    assert any("MyShop" in s and "without meta-task" in s for s in said)


def test_unknown_subsets_are_listed_with_what_is_there(data, tmp_path):
    with pytest.raises(UserError, match="'CIFAR'(.|\n)*'Flowers'(.|\n)*ImageNet-1K, MSCOCO_t2i"):
        run.choose_subsets(data, ["CIFAR", "ImageNet-1K", "Flowers"], tmp_path)
    with pytest.raises(UserError, match="no subset"):
        run.choose_subsets(tmp_path, None, tmp_path)
    with pytest.raises(UserError, match="no subset was chosen"):
        run.choose_subsets(data, [], tmp_path)


def test_both_spellings_of_a_subset_and_the_order_of_the_table(data, tmp_path):
    chosen, others = run.choose_subsets(data, ["MSCOCO_t2i", "ImageNet_1K"], tmp_path)
    assert chosen == ["ImageNet-1K", "MSCOCO_t2i"] and others == []
    evaluate(FakeEncoder(), data, tmp_path / "out", ["MSCOCO_t2i"])
    assert run.choose_subsets(data, ["ImageNet-1K"], tmp_path / "out")[1] == ["MSCOCO_t2i"]


def test_distinct_inputs_are_the_reference_s(goldens, tmp_path):
    golden = json.loads((goldens / "evaluation" / "dedupe.json").read_text())
    write_subset(tmp_path, "Pairs", golden["rows"])
    (source,) = open_eval(tmp_path, [])
    plan = plan_subset(source, {}, {})
    unique = golden["unique_pairs_sorted"]
    assert sorted(plan.keys) == sorted({tuple(k) for k in unique["qry"] + unique["tgt"]})
    assert sorted({plan.keys[n] for n in plan.query_index}) == [tuple(k) for k in unique["qry"]]
    targets = {plan.keys[n] for row in plan.candidates for n in row}
    assert sorted(targets) == [tuple(k) for k in unique["tgt"]]
    assert [len(row) for row in plan.candidates] == [3, 2, 2]


def test_a_score_holds_all_metrics_and_names_the_benchmark(data, tmp_path):
    found, _ = evaluate(FakeEncoder(), data, tmp_path / "out")
    for name in ("ImageNet-1K", "MSCOCO_t2i"):
        score = json.loads((tmp_path / "out" / f"{name}_score.json").read_text())
        assert score["benchmark"] == "MMEB-v1-36" and score["published_shape"] is False
        lines = (tmp_path / "out" / f"{name}_pred.jsonl").read_text().splitlines()
        ranks = [json.loads(line)["rank"] for line in lines]
        assert score["metrics"] == metrics.mean(np.array(ranks))
        assert score["metrics"]["hit@1"] == score["acc"]
        assert found["subsets"][name]["metrics"] == score["metrics"]
    means = found["metric_averages"]
    assert means["hit@1"] == found["averages"] and len(means) == 24
    table = (tmp_path / "out" / "scores.md").read_text()
    assert "| ndcg_exponential |" in table and "MMEB-v1-36" in table


def test_a_global_corpus_in_place_of_lists(data, tmp_path):
    output = tmp_path / "out"
    own, _ = evaluate(FakeEncoder(), data, output)
    encoder = FakeEncoder()
    found, _ = evaluate(encoder, data, output, settings=Settings(candidates="corpus"))
    assert encoder.seen == [] and found["candidates"] == "corpus"
    # Every list of ImageNet-1K is the whole corpus; lists of captions are shorter.
    assert found["subsets"]["ImageNet-1K"]["acc"] == own["subsets"]["ImageNet-1K"]["acc"]
    for source in open_eval(data, []):
        pool = {key for row in source for key in row.target_keys}
        lines = (output / f"{source.subset}_pred.jsonl").read_text().splitlines()
        for n, line in enumerate(map(json.loads, lines)):
            row = source[n]

            def unit(key, root=source.image_root, encoder=encoder):
                vector = encoder.vector(key[0], [root / key[1]] if key[1] else [])
                return vector / np.linalg.norm(vector)

            query, truth = unit(row.query_key), row.target_keys[0]
            scores = {key: float(query @ unit(key)) for key in pool}
            assert line["candidates"] == len(pool)
            assert line["rank"] == 1 + sum(s > scores[truth] for s in scores.values())
            best = max(scores, key=lambda key: scores[key])
            assert (line["predicted"]["text"], line["predicted"]["image"]) == best
            assert line["correct"] == (best == truth)
    again, said = evaluate(FakeEncoder(), data, output)
    assert again == own and any("candidates" in s for s in said)


def test_smaller_vectors_stand_beside_the_full_ones(data, tmp_path):
    output = tmp_path / "out"
    plain, _ = evaluate(FakeEncoder(width=16), data, tmp_path / "plain")
    settings = Settings(dims=(4,), precisions=("int8", "binary"))
    found, _ = evaluate(FakeEncoder(width=16), data, output, settings=settings)
    assert found["averages"] == plain["averages"]
    assert list(found["variants"]) == ["int8", "binary", "dim4", "dim4-int8", "dim4-binary"]
    assert [v["bytes"] for v in found["variants"].values()] == [16, 2, 16, 4, 1]
    # The first four dimensions of every vector, scored as a model of its own.

    class Short(FakeEncoder):
        def vector(self, text, images=()):
            return super().vector(text, images)[:4]

    short, _ = evaluate(Short(width=16), data, tmp_path / "short")
    assert found["variants"]["dim4"]["averages"] == short["averages"]
    for name, subset in short["subsets"].items():
        assert found["variants"]["dim4"]["subsets"][name] == subset["acc"]
    assert "## Smaller vectors" in (output / "scores.md").read_text()


def test_inputs_that_show_the_same_image_are_neighbours(data, tmp_path):
    rows = labels()
    for k, one in enumerate(rows):
        one["qry_text"] = f"<|image_1|> Is this number {k}?\n"
    write_subset(data, "VOC2007", rows)
    encoder = FakeEncoder()
    evaluate(encoder, data, tmp_path / "out")
    shown = [images for _, images in encoder.seen]
    assert shown.count(("ImageNet-1K_3.png",)) == 2
    runs = [name for name, _ in itertools.groupby(shown)]
    assert len([r for r in runs if r]) == len({r for r in runs if r})
    assert runs[-1] == ()  # texts last


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_are_all_inputs_once_and_about_even(count):
    rng = np.random.default_rng(0)
    inputs = [(f"text {n} " * int(rng.integers(1, 9)), ()) for n in range(40)]
    inputs += [(f"q{n}", (f"image {n % 17}",)) for n in range(50)]
    shares = [share(inputs, k, count) for k in range(count)]
    assert sorted(n for part in shares for n in part) == list(range(90))
    for part in shares:
        images = [inputs[n][1] for n in part if inputs[n][1]]
        assert len([k for k, _ in itertools.groupby(images)]) == len(set(images))
        assert abs(len(images) - 50 / count) <= 3


def test_a_subset_whose_name_is_a_path_stays_in_the_output(data, tmp_path):
    with pytest.raises(UserError, match="no subset"):
        run.choose_subsets(data, ["../data/ImageNet-1K"], tmp_path / "out")
