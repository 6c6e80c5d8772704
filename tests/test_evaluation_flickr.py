# SPDX-License-Identifier: Apache-2.0
"""Flickr30K and the leaderboard's file: read in the reference's layout, scored by hand."""

import csv
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from evaluation_data import FakeEncoder, captions, labels, write_subset
from PIL import Image

from vlm2vec_jax import flags
from vlm2vec_jax.data.mmeb import open_eval
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.evaluation import flickr, leaderboard, mmeb, run

COUNT = 7


def picture(n: int) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(n).integers(0, 255, (9, 11, 3), np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def rows() -> list[dict]:
    return [
        {"filename": f"{n}.png", "caption": [f"caption {n} {k}" for k in range(5)]}
        for n in range(COUNT)
    ]


def write_parquet(folder, changed=lambda found: found):
    folder.mkdir(parents=True)
    found = [
        {**row, "image": {"bytes": picture(n), "path": f"{n}.png"}, "sentids": [n], "split": "test"}
        for n, row in enumerate(rows())
    ]
    found.append({**found[0], "filename": "train.png", "split": "train"})
    pq.write_table(pa.Table.from_pylist(changed(found)), folder / "test-00000-of-00001.parquet")
    return folder


def write_csv(folder):
    (folder / "flickr30k-images").mkdir(parents=True)
    with (folder / "test_1k_flickr.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["raw", "sentids", "split", "filename", "img_id"])
        writer.writeheader()
        for n, row in enumerate(rows()):
            (folder / "flickr30k-images" / row["filename"]).write_bytes(picture(n))
            text = json.dumps(row["caption"])
            writer.writerow({"raw": text, "split": "test", "filename": row["filename"]})
    return folder


@pytest.mark.parametrize("write", [write_parquet, write_csv])
def test_recall_both_ways_by_hand(tmp_path, write, monkeypatch, capsys):
    data, encoder = write(tmp_path / "data"), FakeEncoder(width=4)
    monkeypatch.setattr(flickr.command, "make_encoder", lambda args, say: (encoder, {}))
    argv = ["flickr", "--model", "m", "--data", str(data), "--output", str(tmp_path / "out")]
    assert flags.call(flickr.main, flickr.define, argv) == 0
    assert "image to text" in capsys.readouterr().out
    found = json.loads((tmp_path / "out/flickr30k_score.json").read_text())
    # The images go in with the reference's prompt, captions alone.
    assert encoder.seen[0] == (
        "<|image_1|> Find an image caption describing the given image.", ("0.png",)
    )  # fmt: skip
    assert ("caption 3 2", ()) in encoder.seen and len(encoder.seen) == 6 * COUNT

    def unit(text, content=b""):
        path = tmp_path / "one.png"
        path.write_bytes(content)
        vector = FakeEncoder(width=4).vector(text, [path] if content else [])
        return vector / np.linalg.norm(vector)

    images = np.stack([unit(flickr.PROMPT, picture(n)) for n in range(COUNT)])
    texts = np.stack([unit(c) for row in rows() for c in row["caption"]])
    scores = images @ texts.T
    owner = np.arange(5 * COUNT) // 5
    for k in flickr.KS:
        best = np.argsort(-scores, axis=1)[:, :k]
        hits = [(owner[best[n]] == n).any() for n in range(COUNT)]
        assert found["image_to_text"][f"recall@{k}"] == pytest.approx(np.mean(hits))
        best = np.argsort(-scores.T, axis=1)[:, :k]
        hits = [owner[c] in best[c] for c in range(5 * COUNT)]
        assert found["text_to_image"][f"recall@{k}"] == pytest.approx(np.mean(hits))
    assert (found["num_images"], found["num_captions"]) == (COUNT, 5 * COUNT)
    assert found["benchmark"] == "Flickr30K-1K-test"
    # A second run embeds nothing; another prompt is another score.
    encoder.seen.clear()
    assert flags.call(flickr.main, flickr.define, argv) == 0 and encoder.seen == []
    assert flags.call(flickr.main, flickr.define, [*argv, "--image_prompt", "<|image_1|>"]) == 0
    assert len(encoder.seen) == 6 * COUNT
    outside = {p.name for p in tmp_path.iterdir()} - {"data", "out", "one.png"}
    assert not outside


def test_what_is_not_flickr_is_told(tmp_path):
    def evil(found):
        found[0]["filename"] = "../../evil.png"
        found[1]["filename"] = "/tmp/evil.png"
        found[2]["caption"] = []
        found[4]["filename"] = found[3]["filename"]
        return found

    data = write_parquet(tmp_path / "data", evil)
    with pytest.raises(UserError, match=r"\(4 problems\)(.|\n)*evil(.|\n)*captions(.|\n)*second 3"):
        flickr.read(data, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "out"]
    assert not (tmp_path.parent / "evil.png").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="0 csv files"):
        flickr.read(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(UserError, match="no rows of the split 'val'"):
        flickr.read(write_csv(tmp_path / "csv"), tmp_path / "out", split="val")


def test_the_leaderboard_s_file(tmp_path, capsys):
    write_subset(tmp_path / "data", "ImageNet_1K", labels())
    write_subset(tmp_path / "data", "MSCOCO_t2i", captions())
    run.evaluate_sources(FakeEncoder(), open_eval(tmp_path / "data", []), output=tmp_path / "out")
    (tmp_path / "out/VOC2007_score.json").write_text("{")
    argv = ["leaderboard", "--results", tmp_path / "out", "--output", tmp_path / "board.json"]
    argv += ["--model_name", "ours", "--model_size", "2B parameters", "--url", "https://x.example"]
    argv += ["--release_date", "2026-01-31", "--max_length_tokens", "256"]
    assert flags.call(leaderboard.main, leaderboard.define, [str(a) for a in argv]) == 0
    assert "2 of 36 datasets" in capsys.readouterr().out
    found = json.loads((tmp_path / "board.json").read_text())
    assert found["metadata"].pop("report_generated_date").count(":") == 2
    assert found["metadata"] == {
        "model_name": "ours", "model_size": "2B parameters", "embedding_dimension": 8,
        "max_length_tokens": 256, "model_release_date": "2026-01-31",
        "data_source": "Self-Reported", "url": "https://x.example",
    }  # fmt: skip
    assert list(found["metrics"]) == ["image", "video", "visdoc"]
    image = found["metrics"]["image"]
    assert list(image) == [d.name for d in mmeb.DATASETS]
    assert image["CIRR"] == "FILE_N/A" and image["VOC2007"] == "JSON_ERROR"
    scores = image["ImageNet-1K"]
    assert len(scores) == 26 and scores["num_pred"] == scores["num_data"] == 6
    stored = json.loads((tmp_path / "out/ImageNet_1K_score.json").read_text())
    assert scores["hit@1"] == stored["acc"]
    assert {k: v for k, v in scores.items() if "@" in k} == stored["metrics"]
    bad = [str(a) for a in argv[:-4]]
    assert flags.call(leaderboard.main, leaderboard.define, [*bad, "--release_date", "may"]) == 2
    with pytest.raises(UserError, match="no scores of MMEB"):
        leaderboard.report(tmp_path, {})
    other = run.evaluate_sources(
        FakeEncoder("b"), open_eval(tmp_path / "data", ["MSCOCO_t2i"]), output=tmp_path / "out"
    )
    assert other["subsets"]
    with pytest.raises(UserError, match="of another model"):
        leaderboard.report(tmp_path / "out", {})
