# SPDX-License-Identifier: Apache-2.0
"""`MultimodalInput`: what users may hand over, and what is wrong with it in words."""

from pathlib import Path

import pytest
from PIL import Image

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.inputs import IMAGE_MARKER, MultimodalInput

IMAGE = Image.new("RGB", (2, 3))


def test_a_string_is_always_text_even_if_it_looks_like_a_path():
    assert MultimodalInput.of("photo.png") == MultimodalInput("photo.png", ())


@pytest.mark.parametrize("value", [IMAGE, Path("a.png"), {"images": ["a.png"]}, {"image": IMAGE}])
def test_an_image_alone_gets_its_marker(value):
    item = MultimodalInput.of(value)
    assert item.text == "<|image_1|>"
    assert len(item.images) == 1
    assert item.problem() is None


def test_several_images_without_text_get_one_marker_each():
    assert MultimodalInput(images=("a", "b")).text == "<|image_1|><|image_2|>"
    assert MultimodalInput.of({"text": None, "images": ["a", "b"]}).problem() is None


def test_a_mapping_keeps_text_and_images():
    item = MultimodalInput.of({"text": "<|image_1|> x", "image": "a.png"})
    assert (item.text, item.images) == ("<|image_1|> x", ("a.png",))
    assert MultimodalInput.of({"text": "x", "images": None}) == MultimodalInput("x")
    assert MultimodalInput.of(item) is item


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (3, "not int"),
        (["x"], "not list"),
        ({"txt": "x"}, "txt"),
        ({"image": "a", "images": ["a"]}, "both"),
        ({"text": 3}, "'text' must be a string"),
        ({"images": 3}, "'images' must be a list"),
        ({"images": [3]}, "path or a PIL image"),
        ({"images": [""]}, "path or a PIL image"),
        ({"images": [None]}, "path or a PIL image"),
    ],
)
def test_a_wrong_type_is_said_in_words(value, said):
    with pytest.raises(UserError, match=said):
        MultimodalInput.of(value)


@pytest.mark.parametrize(
    ("text", "images", "said"),
    [
        ("", (), "neither text nor image"),
        ("no marker", ("a",), "1 image.* none"),
        ("<|image_1|>", (), "0 image.*<|image_1|>"),
        ("<|image_2|>", ("a",), "image_2"),
        ("<|image_1|> <|image_3|>", ("a", "b"), "image_3"),
        ("<|image_1|> <|image_1|>", ("a",), "exactly once"),
        ("<|image_1|>", ("a", "b"), "2 image"),
    ],
)
def test_problem_names_what_disagrees(text, images, said):
    problem = MultimodalInput(text, images).problem()
    assert problem is not None
    assert all(part in problem for part in said.split(".*"))


@pytest.mark.parametrize(
    ("text", "images"),
    [("x", ()), (" ", ()), ("a <|image_1|> b", ("a",)), ("<|image_2|> <|image_1|>", ("a", "b"))],
)
def test_no_problem(text, images):
    assert MultimodalInput(text, images).problem() is None


def test_relative_paths_are_joined_and_images_kept():
    item = MultimodalInput("<|image_1|><|image_2|><|image_3|>", ("a.png", "/b.png", IMAGE))
    moved = item.relative_to("root")
    assert moved.images == (Path("root/a.png"), Path("/b.png"), IMAGE)
    assert moved.text == item.text
    assert item.images[0] == "a.png"


def test_the_marker_is_the_reference_s():
    text = "<|image_1|> <|image_12|> <|image|> <|image_x|> <image_3> <|image_4 |>"
    assert IMAGE_MARKER.findall(text) == ["1", "12"]
