# SPDX-License-Identifier: Apache-2.0
"""The HTML report and its pages: complete, offline, harmless, and there with parts missing."""

import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from evaluation_data import FakeEncoder, captions, labels, row, write_subset
from PIL import Image

from vlm2vec_jax import flags
from vlm2vec_jax.data.mmeb import open_eval
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.evaluation import compare, examples, mmeb, pages, report, run, tables

EVIL = '<script>alert(1)</script><img src=x onerror="alert(2)">'


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Data, evaluations of two models, and a training folder."""
    root = tmp_path_factory.mktemp("report")
    data = root / "data"
    write_subset(data, "ImageNet-1K", labels())
    write_subset(data, "MSCOCO_t2i", captions())
    odd = [row((f"{EVIL}\n", ""), (f"{k} {EVIL}", ""), ('other & "that"', "")) for k in range(4)]
    write_subset(data, "My Shop <b>", odd)
    for name in ("a", "b"):
        run.evaluate_sources(FakeEncoder(name), open_eval(data, []), output=root / name)
    train = root / "train"
    train.mkdir()
    lines = [
        json.dumps({"step": s, "loss": 3 / s, "accuracy": 1 - 1 / s, "lr": 1e-4}) for s in (1, 2, 3)
    ]
    nothing = json.dumps({"step": 4, "loss": None, "accuracy": 0.8, "lr": 1e-5})
    (train / "metrics.jsonl").write_text("\n".join([*lines, nothing, '{"step": 5, "lo']))
    return root


class Tags(html.parser.HTMLParser):
    """Collects what a browser would see."""

    VOID = {"img", "meta", "br"}

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data):
        self.words.append(data)


def write(made, **options):
    path = made / "report.html"
    report.write_report(path, **options)
    return path.read_text(encoding="utf-8")


def pages_of(made) -> dict[str, str]:
    """The pages of the datasets, by file."""
    folder = pages.folder_of(made / "report.html")
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.iterdir())}


def test_every_page_is_whole_and_offline(made):
    page = write(
        made, trained=made / "b", untrained=made / "a", train=made / "train", data=made / "data"
    )
    text = " ".join(Tags(page).words)
    for words in ("untrained", "trained", "gain", "ImageNet-1K", "MSCOCO_t2i", "IND", "Training"):
        assert words in text
    single = pages_of(made)
    assert list(single) == ["ImageNet-1K.html", "MSCOCO_t2i.html", pages.name_of("My Shop <b>")]
    check_page(page, made)
    led_to = [a["href"] for tag, a in Tags(page).tags if tag == "a"]
    assert sorted(led_to) == sorted(f"report_pages/{name}" for name in single)
    pictures = 0
    for name, one in single.items():
        check_page(one, made / "report_pages")
        leads = [a["href"] for tag, a in Tags(one).tags if tag == "a"]
        assert leads.count("../report.html") == 2 and name not in leads
        text = " ".join(Tags(one).words)
        assert "untrained: rank" in text and "hit@10" in text and "wrong ones first" in text
        pictures += sum(tag == "img" for tag, _ in Tags(one).tags)
    assert pictures > 10
    # In the order of the table each leads to the next.
    assert "MSCOCO_t2i.html" in single["ImageNet-1K.html"]
    assert "ImageNet-1K.html" in single["MSCOCO_t2i.html"]


def check_page(page, folder):
    seen = Tags(page)
    assert seen.open == []
    for tag, attributes in seen.tags:
        assert tag not in ("script", "iframe", "link", "object", "embed", "form")
        assert not [name for name in attributes if name.startswith("on")]
        if tag == "img":
            assert attributes["src"].startswith(
                ("data:image/png", "data:image/jpeg", "data:image/svg")
            )
        if tag == "a":
            assert (folder / attributes["href"]).is_file()
    assert not re.search(r"(src|href)=[\"']?(http|//|file)", page)


def test_text_of_the_data_is_shown_and_never_run(made):
    page = write(made, trained=made / "b", data=made / "data")
    shop = pages_of(made)[pages.name_of("My Shop <b>")]
    for one in (page, shop):
        assert "<script" not in one and 'onerror="' not in one
        assert "My Shop &lt;b&gt;" in one
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in shop


def test_right_and_wrong_are_marked_in_words(made):
    folder = made / "b"
    write(made, trained=folder, data=made / "data", count=100)
    page = "".join(pages_of(made).values())
    rows = [
        json.loads(line)
        for path in folder.glob("*_pred.jsonl")
        for line in path.read_text().splitlines()
    ]
    right = sum(r["correct"] for r in rows)
    assert 0 < right < len(rows)
    assert page.count("✓ right") == right
    assert page.count("✗ wrong: truth at ") == len(rows) - right
    assert page.count("✗ taken") == len(rows) - right
    assert page.count("✓ truth") == len(rows)  # also where it is not among the first five


def test_each_part_may_be_missing(made, tmp_path):
    page = write(made, untrained=made / "a")
    assert "Training" not in page and "gain" not in page
    # Without the data there are the names of the pictures in place of the pictures.
    assert "img/ImageNet-1K_0.png" in pages_of(made)["ImageNet-1K.html"]
    (tmp_path / "empty").mkdir()
    page = write(made, trained=made / "b", train=tmp_path / "empty", data=tmp_path)
    assert "There are no metrics of the training" in page
    assert "no picture:" in pages_of(made)["ImageNet-1K.html"]


def test_it_works_without_predictions_and_old_pages_go(made, tmp_path):
    scores = json.loads((made / "b" / "scores.json").read_text())
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    write(made, trained=tmp_path, data=made / "data")
    assert all("There are no predictions of this subset" in p for p in pages_of(made).values())
    del scores["subsets"]["MSCOCO_t2i"]
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    (made / "report_pages" / "mine.html").write_text("my own notes")
    write(made, trained=tmp_path, data=made / "data")
    assert {"MSCOCO_t2i.html", "mine.html"} & set(pages_of(made)) == {"mine.html"}
    (made / "report_pages" / "mine.html").unlink()


@pytest.mark.parametrize("names", [("a b", "a-b", "a<b"), ("..", "."), ("x" * 300, "x" * 299)])
def test_names_of_pages_are_plain_and_never_meet(names):
    files = [pages.name_of(name) for name in names]
    assert len(set(files)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+\.html", f) and len(f) < 320 for f in files)


def test_what_cannot_be_a_report_is_told(made, tmp_path):
    with pytest.raises(UserError, match="needs an evaluation folder"):
        report.write_report(tmp_path / "x.html")
    with pytest.raises(UserError, match="scores.json is not there"):
        report.write_report(tmp_path / "x.html", trained=tmp_path)
    (tmp_path / "scores.json").write_text("[]")
    with pytest.raises(UserError, match="cannot be read as scores"):
        report.write_report(tmp_path / "x.html", trained=tmp_path)


def test_a_picture_outside_the_data_is_not_read(made, tmp_path):
    (made / "data" / "secret").mkdir(exist_ok=True)
    pictures = report.html.Pictures(made / "data" / "secret")
    for name in ("../img/ImageNet-1K_0.png", str(made / "data/img/ImageNet-1K_0.png")):
        assert "<img" not in pictures.show(name)


@pytest.mark.parametrize("count", [0, 1, 2, 5, 6, 7, 40])
@pytest.mark.parametrize("wrong", [0, 1, 3, 17, 20])
def test_examples_are_half_wrong_where_possible(count, wrong):
    correct = [n >= wrong for n in range(20)]
    rows = examples.choose(correct, count)
    assert len(rows) == min(count, 20) == len(set(rows))
    assert rows == sorted(rows, key=lambda n: (correct[n], n))  # wrong ones first
    shown = sum(not correct[n] for n in rows)
    assert shown >= min(wrong, count // 2)
    assert len(rows) - shown >= min(20 - wrong, count // 2)


def test_the_command(made, capsys):
    argv = ["report", "--trained", str(made / "b"), "--output", str(made / "command.html")]
    assert flags.call(report.main, report.define, argv) == 0
    assert "command.html" in capsys.readouterr().out and (made / "command.html").exists()
    argv = ["report", "--trained", str(made / "nowhere"), "--output", str(made / "x.html")]
    assert flags.call(report.main, report.define, argv) == 2
    assert "nowhere" in capsys.readouterr().err and not (made / "x.html").exists()


# --------------------------------------------------------------------------- beside published ones


def as_published(names) -> dict:
    """Scores of MMEB's own data, all 70 percent."""
    subsets = {
        name: {
            "acc": 0.7, "acc_reference": 0.7, "meta_task": mmeb.group_of(name)[0],
            "split": mmeb.group_of(name)[1], "num_correct": 700, "num_pred": 1000,
            "published_shape": True,
        }
        for name in names
    }  # fmt: skip
    return {"subsets": subsets, "averages": tables.averages(subsets)}


def test_all_36_stand_beside_published_models(tmp_path):
    scores = as_published(d.name for d in mmeb.DATASETS)
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    report.write_report(tmp_path / "r.html", trained=tmp_path)
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    text = " ".join(Tags(page).words)
    for words in ("VLM2Vec LLaVA-1.6, 1344 px", "74.5 (-4.5)", "All: mean of 36", "62.9 (+7.1)",
                  "arXiv 2410.05160"):  # fmt: skip
        assert words in text
    assert '<td class="n down">74.5 (-4.5)</td>' in page
    assert '<td class="n up">62.9 (+7.1)</td>' in page
    single = (tmp_path / "r_pages" / "ImageNet-1K.html").read_text(encoding="utf-8")
    assert len(list((tmp_path / "r_pages").iterdir())) == 36
    assert "VLM2Vec LLaVA-1.6, 1344 px 74.5 (-4.5)" in single
    table = (tmp_path / "r.md").read_text(encoding="utf-8")
    assert "74.5 (-4.5)" in table and "## Beside published models" in table
    report.write_report(tmp_path / "r.html", trained=tmp_path, models=["CLIP"])
    only = (tmp_path / "r.md").read_text(encoding="utf-8")
    assert "37.8 (+32.2)" in only and "LLaVA" not in only


def test_averages_of_some_datasets_are_not_compared():
    names = [d.name for d in mmeb.DATASETS if d.meta_task == "grounding"][:3]
    found = compare.lines(as_published(names), compare.models())
    assert [line.name for line in found] == names and not any(line.average for line in found)
    whole = [d.name for d in mmeb.DATASETS if d.meta_task == "grounding"]
    found = compare.lines(as_published(whole), compare.models(["CLIP"]))
    assert found[-1].average and found[-1].theirs == [51.8]
    with pytest.raises(UserError, match="'GPT'; known are"):
        compare.models(["CLIP", "GPT"])


def test_other_data_of_the_same_names_is_not_compared(made):
    page = write(made, trained=made / "b", data=made / "data")
    assert "2 of 2 subsets of MMEB" in page and "do not compare" in page and "62.9" not in page
    table = (made / "report.md").read_text(encoding="utf-8")
    assert "do not compare" in table and "## Metrics" in table


def test_markdown_says_what_was_gained(made):
    write(made, trained=made / "b", untrained=made / "a")
    table = (made / "report.md").read_text(encoding="utf-8")
    assert "## Before and after" in table and "| gain |" in table


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((path for path in map(shutil.which, BROWSERS) if path), None)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on the path")
def test_a_browser_draws_the_pages(made, tmp_path):
    """Opened from disk without a network: tables, pictures and charts are there, in colour."""
    path = tmp_path / "report.html"
    report.write_report(
        path, trained=made / "b", untrained=made / "a", train=made / "train", data=made / "data"
    )
    pixels = photographed(path, tmp_path)
    written = (pixels.sum(axis=2) < 3 * 200).any(axis=1)
    assert written[:1000].sum() > 300 and written[1000:].any()  # far down the page, too
    blue = (abs(pixels - (0x0B, 0x69, 0xA3)).sum(axis=2) < 12).sum()
    assert blue > 2000  # the bars of the trained model
    pixels = photographed(tmp_path / "report_pages" / "ImageNet-1K.html", tmp_path)
    noise = pixels.std(axis=2) > 40
    assert noise.sum() > 3000  # the pictures, random colours


def photographed(path, tmp_path) -> np.ndarray:
    """What a browser shows of a page, int [3000, 1100, 3]."""
    shot = tmp_path / f"{path.stem}.png"
    argv = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--hide-scrollbars", "--window-size=1100,3000", f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr", f"--screenshot={shot}", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert shot.exists(), done.stderr[-2000:]
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not said  # nothing refused by the page's policy, nothing missing
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape == (3000, 1100, 3)
    return pixels
