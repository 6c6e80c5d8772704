# SPDX-License-Identifier: Apache-2.0
"""Bad and odd inputs through `embed`: all told together, the earlier file kept."""

import numpy as np
import pytest
from commands import call, embed_argv, one_embedder, refused, tear, write_lines
from PIL import Image
from small_models import picture

from vlm2vec_jax import embed


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    with one_embedder():
        yield


def test_embed_reports_bad_lines_together(base, tmp_path, capsys):
    picture(1).save(tmp_path / "fine.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_bytes(b"no picture")
    lines = write_lines(
        tmp_path, {"text": "fine"}, "", "nonsense", "[1]", {"text": 3}, {"txt": "a"}, {},
        {"text": "<|image_2|>", "images": ["fine.png"]}, {"text": "<|image_1|>"},
        {"images": ["gone.png"]}, {"images": ["empty.png"]}, {"images": ["text.png"]},
        {"images": [""]}, {"images": [None]}, {"images": ["."]}, {"images": ["\0"]},
        {"text": "x", "image": "fine.png", "images": []}, '"a text"', {"images": ["fine.png"]},
        {"text": "\ud800 <|image_1|>", "images": ["gone.png"]},
    )  # fmt: skip
    assert call(embed, *embed_argv(base, lines, tmp_path / "o.npz")) == 2
    said = refused(capsys, lines, "(17 problems)", "line 3: not JSON", "line 5: 'text' must be",
                   "line 7: neither text nor image", "line 8: 1 image(s) but markers <|image_2|>",
                   f"line 10: {tmp_path}/gone.png: no such image file",
                   f"line 11: {tmp_path}/empty.png: the file is empty",
                   f"line 12: {tmp_path}/text.png: not an image",
                   "line 15:", "is a directory, not an image")  # fmt: skip
    for fine in (1, 2, 19):
        assert f"line {fine}:" not in said
    assert not (tmp_path / "o.npz").exists()


def test_embed_counts_lines_of_images_that_fail_late(base, tmp_path, capsys):
    picture(1).save(tmp_path / "fine.png")
    picture(1, (90, 90)).save(tmp_path / "torn.png")
    tear(tmp_path / "torn.png")
    (tmp_path / "o.npz").write_bytes(b"earlier")
    lines = write_lines(tmp_path, {"text": "a"}, "", {"images": "torn.png"}, "",
                        {"images": "fine.png"}, {"images": ["torn.png"]})  # fmt: skip
    assert call(embed, *embed_argv(base, lines, tmp_path / "o.npz")) == 2
    said = refused(capsys, lines, "(2 problems)", "line 3: ", "line 6: ", "torn.png: truncated")
    assert "line 5" not in said
    long = {"text": "<|image_1|>" + "word " * 5000, "images": ["fine.png"]}
    write_lines(tmp_path, "", {"text": "a"}, long)
    assert call(embed, *embed_argv(base, lines, tmp_path / "o.npz")) == 2
    refused(capsys, "line 3: ", "tokens are more than the 4096", "num_crops")
    assert (tmp_path / "o.npz").read_bytes() == b"earlier"


def test_embed_reads_what_other_programs_write(base, tmp_path, capsys):
    lines = tmp_path / "inputs.jsonl"
    lines.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\r\n')
    assert call(embed, *embed_argv(base, lines, tmp_path / "o.npz")) == 0
    with np.load(tmp_path / "o.npz") as found:
        assert list(found) == ["embeddings"] and found["embeddings"].shape == (2, 32)
    lines.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    assert call(embed, *embed_argv(base, lines, tmp_path / "o.npz")) == 2
    refused(capsys, "line 2: not UTF-8")
    lines.write_bytes(b"\n")
    assert call(embed, *embed_argv(base, lines, tmp_path / "none.npz")) == 0
    with np.load(tmp_path / "none.npz") as found:
        assert found["embeddings"].shape == (0, 32)


def test_embed_refuses_impossible_paths(base, tmp_path, capsys):
    lines = write_lines(tmp_path, {"text": "a"})
    (tmp_path / "folder.npz").mkdir()
    for output, words in (
        (tmp_path / "o.txt", "ends in .npz"),
        (tmp_path / "gone" / "o.npz", f"no folder {tmp_path / 'gone'}; make it first"),
        (tmp_path / "folder.npz", "is a folder"),
    ):
        assert call(embed, *embed_argv(base, lines, output)) == 2
        refused(capsys, output, words)
    for path, words in ((tmp_path / "gone", "No such file"), (tmp_path, "Is a directory")):
        assert call(embed, *embed_argv(base, path, tmp_path / "o.npz")) == 2
        refused(capsys, f"--input {path} cannot be read", words)


def test_embed_takes_odd_images(base, tmp_path):
    rgb = picture(5, (64, 48))
    exif = Image.Exif()
    exif[0x0112] = 6
    shades = Image.fromarray(np.arange(64 * 48, dtype=np.uint16).reshape(48, 64) * 21)
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg")
    shades.save(tmp_path / "deep.png")
    rgb.save(tmp_path / "moving.gif", save_all=True, append_images=[picture(6, (64, 48))])
    rgb.save(tmp_path / "turned.jpg", exif=exif)
    rgb.convert("1").save(tmp_path / "bits.png")
    rgb.convert("P").save(tmp_path / "palette.png", transparency=3)
    rgb.convert("LA").save(tmp_path / "grey_alpha.png")
    rgb.convert("RGBA").save(tmp_path / "alpha.webp", lossless=True)
    picture(5, (2000, 10)).save(tmp_path / "wide.png")
    picture(5, (1, 1)).save(tmp_path / "dot.png")
    names = sorted(p.name for p in tmp_path.iterdir())
    assert len(names) == 10
    lines = write_lines(tmp_path, *({"images": [name]} for name in names))
    assert call(embed, *embed_argv(base, lines, tmp_path / "o.npz")) == 0
    with np.load(tmp_path / "o.npz") as found:
        vectors = found["embeddings"]
    assert np.isfinite(vectors).all()
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert (vectors @ vectors.T - np.eye(10)).max() < 1 - 1e-5


def test_a_picture_too_narrow_to_scale_is_refused_in_words(base, tmp_path, capsys):
    Image.new("RGB", (3000, 1)).save(tmp_path / "line.png")
    lines = write_lines(tmp_path, {"images": ["line.png"]})
    assert call(embed, *embed_argv(base, lines, tmp_path / "o.npz", "--num_crops", "1")) == 2
    refused(capsys, "line 1: ", "line.png: 3000 x 1 pixels are too narrow", "num_crops")
