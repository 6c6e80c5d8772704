# SPDX-License-Identifier: Apache-2.0
"""Mini-MMEB: MMEB's layout on disk, right answers that stand alone, held-out combinations."""

import collections
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlm2vec_jax.data import mini_builders, mini_mmeb, scenes
from vlm2vec_jax.data.mini_tasks import PARAPHRASES, TASKS, Task
from vlm2vec_jax.inputs import MultimodalInput

BY_NAME = {task.name: task for task in TASKS}
SCALE = 0.06
TRAIN = [task for task in TASKS if task.split == "ind"]
# MMEB's own division of the names used here
MMEB_OOD = set(
    "Place365 ImageNet-A ImageNet-R ObjectNet Country211 ScienceQA VizWiz GQA TextVQA OVEN "
    "FashionIQ EDIS Wiki-SS-NQ Visual7W-Pointing RefCOCO RefCOCO-Matching".split()
)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A small data set, every scene drawn for each phase, and what the lists were built from."""
    drawn: dict[str, list[scenes.Scene]] = collections.defaultdict(list)
    lists: dict[str, tuple] = {}
    draw, candidates = mini_builders.World.draw, Task.candidates

    def recording(self, folder, scene, rng):
        drawn[self.phase].append(scene)
        return draw(self, folder, scene, rng)

    def keeping(self, world, examples, count):
        lists[self.name] = examples, candidates(self, world, examples, count)
        return lists[self.name][1]

    root = tmp_path_factory.mktemp("mini") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mini_builders.World, "draw", recording)
        patch.setattr(Task, "candidates", keeping)
        mini_mmeb.write_mini_mmeb(root, seed=3, scale=SCALE)
    return root, drawn, lists


def _train_rows(root: Path, task, split="original") -> list[dict]:
    return pq.read_table(
        root / "train" / task.train_name / f"{split}-00000-of-00001.parquet"
    ).to_pylist()


def _eval_rows(root: Path, task) -> list[dict]:
    return pq.read_table(root / "eval" / task.name / "test-00000-of-00001.parquet").to_pylist()


def _modality(text: str, image: str) -> str:
    return ("I" if image else "") + ("T" if text else "")


@pytest.fixture(scope="module")
def built(written):
    """Each evaluation subset in memory: its examples and their candidates."""
    return written[2]


def test_table_covers_what_mmeb_has():
    assert len(TASKS) == len(BY_NAME) >= 12
    assert {t.name for t in TASKS if t.split == "ood"} == set(BY_NAME) & MMEB_OOD
    for split in ("ind", "ood"):
        metas = {t.meta_task for t in TASKS if t.split == split}
        assert metas == {"classification", "vqa", "retrieval", "grounding"}
    modalities = {(t.query, t.target) for t in TASKS}
    assert modalities == {
        ("I", "T"), ("I", "I"), ("T", "I"), ("IT", "I"), ("IT", "T"), ("T", "IT"), ("IT", "IT"),
    }  # fmt: skip
    for task in TRAIN:
        assert 400 <= task.rows <= 2000
        assert len({task.phrase("x", k) for k in range(PARAPHRASES)}) == PARAPHRASES, task.name


def test_train_layout(written):
    root, *_ = written
    folders = {p.name for p in (root / "train").iterdir()}
    assert folders == {t.train_name for t in TRAIN} | {"images"}
    assert "ImageNet_1K" in folders
    for task in TRAIN:
        schema = pq.read_schema(
            root / "train" / task.train_name / "original-00000-of-00001.parquet"
        )
        columns = ["qry", "qry_image_path", "pos_text", "pos_image_path"]
        if task.name in mini_mmeb.NEGATIVES:
            columns += ["neg_text", "neg_image_path"]
        assert schema.names == columns
        assert all(schema.field(name).type == pa.string() for name in columns)
        rows, diverse = _train_rows(root, task), _train_rows(root, task, "diverse_instruction")
        assert len(rows) == max(8, round(task.rows * SCALE))
        for row, other in zip(rows, diverse, strict=True):
            assert row["qry"] != other["qry"]
            assert {k: v for k, v in row.items() if k != "qry"} == {
                k: v for k, v in other.items() if k != "qry"
            }
            if "neg_image_path" in row:
                assert row["neg_image_path"] != row["pos_image_path"]
    assert any("neg_text" in _train_rows(root, task)[0] for task in TRAIN)


def test_eval_layout(written):
    root, *_ = written
    assert {p.name for p in (root / "eval").iterdir()} == set(BY_NAME) | {"eval_images"}
    strings = pa.list_(pa.string())
    for task in TASKS:
        table = pq.read_table(root / "eval" / task.name / "test-00000-of-00001.parquet")
        assert table.schema.names == ["qry_text", "qry_img_path", "tgt_text", "tgt_img_path"]
        assert table.schema.field("tgt_text").type == table.schema.field("tgt_img_path").type
        assert table.schema.field("tgt_text").type.value_type == strings.value_type
        for row in table.to_pylist():
            assert len(row["tgt_text"]) == len(row["tgt_img_path"])
            expected = len(task.labels) or mini_mmeb.CANDIDATES
            assert len(row["tgt_text"]) == expected
            if task.meta_task in ("retrieval", "grounding"):
                assert expected >= 300
            pairs = set(zip(row["tgt_text"], row["tgt_img_path"]))
            assert len(pairs) == expected, f"{task.name} repeats a candidate"


def test_rows_are_embeddable_and_of_the_stated_modality(written):
    root, *_ = written
    for task in TASKS:
        sides = [(r["qry_text"], r["qry_img_path"], "q") for r in _eval_rows(root, task)]
        for row in _eval_rows(root, task):
            sides += [(t, i, "t") for t, i in zip(row["tgt_text"], row["tgt_img_path"])]
        folder = root / "eval"
        _check_sides(task, sides, folder)
        if task.split == "ind":
            sides = []
            for split in ("original", "diverse_instruction"):
                for row in _train_rows(root, task, split):
                    sides.append((row["qry"], row["qry_image_path"], "q"))
                    sides.append((row["pos_text"], row["pos_image_path"], "t"))
                    if "neg_text" in row:
                        sides.append((row["neg_text"], row["neg_image_path"], "t"))
            _check_sides(task, sides, root / "train")


def _check_sides(task, sides, folder):
    for text, image, side in set(sides):
        path = folder / image
        images = (path,) if image else ()
        assert MultimodalInput(text, images).problem() is None, (task.name, text, image)
        wanted = task.query if side == "q" else task.target
        # an image always comes with some words, so "I" and "IT" differ in what the words say
        assert ("I" in wanted) == bool(image), (task.name, text)
        assert text, task.name
        if image:
            assert path.is_file()


def test_images_are_small_rgb_and_all_used(written):
    root, *_ = written
    for phase, task_rows in (("train", _train_rows), ("eval", _eval_rows)):
        named = set()
        for task in TASKS if phase == "eval" else TRAIN:
            for row in task_rows(root, task):
                for key, value in row.items():
                    if "im" in key and "path" in key:
                        named.update([value] if isinstance(value, str) else value)
        files = {str(p.relative_to(root / phase)) for p in (root / phase).rglob("*.png")}
        assert files == named - {""}
        for name in sorted(files)[::200]:
            with Image.open(root / phase / name) as image:
                assert image.size == (scenes.SIZE, scenes.SIZE) and image.mode == "RGB"


@pytest.mark.parametrize(
    "name, text",
    [
        ("ImageNet-1K", "<|image_1|> Represent the given image for classification.\n"),
        ("VOC2007", "<|image_1|> Identify the object shown in the image\n"),
        ("SUN397", "<|image_1|> Identify the scene shown in the image.\n"),
        ("NIGHTS", "<|image_1|>\nFind a day-to-day image that looks similar to the provided "
                   "image.\n"),
        ("MSCOCO_i2t", "<|image_1|> Find an image caption describing the given everyday image.\n"),
        ("OK-VQA", "<|image_1|>\nRepresent the given image with the following question: x\n"),
        ("MSCOCO_t2i", "Find me an everyday image that matches the given caption: x\n"),
        ("WebQA", "Find a Wikipedia image that answers this question: x\n"),
        ("CIRR", "<|image_1|>\nGiven an image, find a similar everyday image with the described "
                 "changes: x\n"),
        ("MSCOCO", "<|image_1|>\nSelect the portion of the image that isolates the object labeled "
                   'as "x"\n'),
    ],
)  # fmt: skip
def test_query_texts_have_mmeb_form(name, text):
    assert BY_NAME[name].phrase("x" if "x" in text.split()[-1] else "") == text


def test_target_texts_have_mmeb_form(built):
    def first(name):
        return built[name][1][0][0].side.text

    assert first("MSCOCO_t2i") == "<|image_1|> Represent the given image.\n"
    assert first("CIRR") == first("NIGHTS") == "<|image_1|> Represent the given image."
    assert "<|image" not in first("MSCOCO_i2t") and not first("MSCOCO_i2t").endswith("\n")
    assert first("ImageNet-1K") in BY_NAME["ImageNet-1K"].labels


def test_truth_is_first_and_no_other_candidate_answers_too(built):
    for name, (examples, lists) in built.items():
        for example, row in zip(examples, lists, strict=True):
            assert row[0] == example.truth
            keys = [candidate.key for candidate in row]
            assert len(set(keys)) == len(keys), name
            assert row[0].key not in keys[1:]
            if BY_NAME[name].meta_task == "vqa":
                for candidate in row[1:]:
                    words = set(candidate.side.text.split()) - {"on", "the"}
                    assert not words <= example.asked, (name, example.text, candidate.side.text)


def test_candidates_beside_the_truth_come_in_no_order(built):
    """A near miss always in second place would be a hint to whoever reads the lists."""
    for name in ("CIRR", "MSCOCO", "EDIS"):
        examples, lists = built[name]
        for near in range(len(examples[0].near)):
            places = [row.index(e.near[near]) for e, row in zip(examples, lists)]
            assert np.std(places) > 10, name


def test_ignoring_the_text_of_a_composed_query_fails(built):
    """The reference picture itself stands among the candidates of `the same but red`."""
    for name in ("CIRR", "FashionIQ", "OVEN"):
        for example, row in zip(*built[name]):
            assert example.image in [candidate.side.image for candidate in row[1:]]
            assert example.image != row[0].side.image


def test_one_picture_stands_under_several_instructions(built):
    for name in ("A-OKVQA", "OK-VQA", "Visual7W", "DocVQA", "ChartQA", "MSCOCO"):
        examples, _ = built[name]
        answers = collections.defaultdict(set)
        for example in examples:
            answers[example.image].add(example.truth.key)
        several = sum(len(keys) > 1 for keys in answers.values())
        assert several >= len(answers) / 2, name


def test_training_pictures_are_shared_between_subsets(written):
    root, *_ = written
    users = collections.defaultdict(set)
    for task in TRAIN:
        for row in _train_rows(root, task):
            users[row["qry_image_path"]].add(task.name)
    users.pop("")
    assert max(len(names) for names in users.values()) >= 3


def test_held_out_combinations_are_never_in_training(written):
    root, drawn, _ = written
    assert drawn["train"] and drawn["eval"]
    for scene in drawn["train"]:
        assert not set(scene.things) & set(scenes.HELD_OUT_THINGS)
        assert scene.place not in scenes.HELD_OUT_PLACES
        assert scene.style == "flat"
    held_out = [str(x) for x in (*scenes.HELD_OUT_THINGS, *scenes.HELD_OUT_PLACES)]
    for task in TRAIN:
        for split in ("original", "diverse_instruction"):
            for row in _train_rows(root, task, split):
                for column in ("qry", "pos_text", "neg_text"):
                    assert not any(words in row.get(column, "") for words in held_out), row


def test_held_out_subsets_ask_for_what_they_hold_out(built):
    shifts = collections.Counter()
    for name, (examples, _) in built.items():
        task = BY_NAME[name]
        assert bool(task.shift) == (task.split == "ood")
        shifts[task.shift] += 1
        for example in examples:
            if task.shift == "things":
                assert set(example.things) & set(scenes.HELD_OUT_THINGS), name
            elif task.shift == "places":
                assert example.truth.key in {str(p) for p in scenes.HELD_OUT_PLACES}
            else:
                assert not set(example.things) & set(scenes.HELD_OUT_THINGS), name
    assert set(shifts) == {"", "things", "places", "style", "fonts"}


def test_every_word_of_a_held_out_combination_is_trained():
    for index in (0, 1):
        assert {t[index] for t in scenes.SEEN_THINGS} == {t[index] for t in scenes.THINGS}
        assert {p[index] for p in scenes.SEEN_PLACES} == {p[index] for p in scenes.PLACES}
    assert len(scenes.HELD_OUT_THINGS) == 8 and len(scenes.HELD_OUT_PLACES) == 4


def test_photographs_and_digits_of_evaluation_are_others():
    assert not set(scenes.TRAIN_PHOTOS) & set(scenes.EVAL_PHOTOS)
    assert not set(scenes.TRAIN_FONTS) & set(scenes.HELD_OUT_FONTS)
    assert len(scenes.photo_regions(scenes.EVAL_PHOTOS)) >= mini_mmeb.CANDIDATES
    task, images = BY_NAME["VOC2007"], {}
    for phase, count in (("train", 1397), ("eval", 400)):
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            blank = Image.new("RGB", (scenes.SIZE, scenes.SIZE))

            def record(pixels, *rest, seen=seen, blank=blank):
                seen.append(pixels.tobytes())
                return blank

            patch.setattr(scenes, "draw_digit", record)
            task.examples(mini_builders.World(0, phase), count)
        images[phase] = set(seen)
    assert len(images["train"] & images["eval"]) == 0


def test_things_stand_where_the_boxes_say():
    """Each box holds its own thing's colour and not the other's."""
    rng = np.random.default_rng(0)
    for number in range(60):
        left = scenes.SEEN_THINGS[number * 7 % 40]
        right = next(
            t
            for t in scenes.SEEN_THINGS[number % 40 :] + scenes.SEEN_THINGS
            if t.color != left.color and t.shape != left.shape
        )
        scene = scenes.Scene((left, right), scenes.SEEN_PLACES[number % 16])
        image, boxes = scenes.draw_scene(scene, rng)
        for k in (0, 1):
            assert 0 <= boxes[k][0] < boxes[k][2] <= 56 and 0 <= boxes[k][1] < boxes[k][3] <= 56
            pixels = np.asarray(image.crop(boxes[k]), np.float32)
            near = [
                (np.abs(pixels - scenes.COLORS[t.color]).max(-1) <= 12).mean()
                for t in (scene.things[k], scene.things[1 - k])
            ]
            assert near[0] > 0.1 and near[1] < 0.01, (scene, k, near)


def test_shapes_and_textures_look_different():
    masks = [scenes.shape_mask(shape, 24) for shape in scenes.SHAPES]
    for i, mask in enumerate(masks):
        assert mask.shape == (24, 24) and mask.min() >= 0 and mask.max() <= 1
        assert all(np.abs(mask - other).mean() > 0.1 for other in masks[:i])
