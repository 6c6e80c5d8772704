# SPDX-License-Identifier: Apache-2.0
"""Exports through the command: round trips to the bit, records, cards, every form and refusal."""

import dataclasses
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from backbone_goldens import GOLDENS, VARIANTS
from full_disk import small_disk
from safetensors.numpy import load_file

from vlm2vec_jax import export
from vlm2vec_jax.embedder import Embedder
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.export import size_of
from vlm2vec_jax.flags import call
from vlm2vec_jax.models.loading import abstract_model
from vlm2vec_jax.models.phi3v import backbone
from vlm2vec_jax.training.prompts import common_prompt, prompts_of
from vlm2vec_jax.weights.safetensors import Checkpoint, write
from vlm2vec_jax.weights.sentence_transformers import SentenceTransformers

EMBED = "model.embed_tokens.weight"
WTE = "model.vision_embed_tokens.wte.weight"


def run(checkpoint, form, output, *more):
    argv = ["export", "--checkpoint", str(checkpoint), "--format", form, "--output", str(output)]
    return call(export.main, export.define, [*argv, *map(str, more)])


def tensors_of(folder):
    with Checkpoint(folder) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.names}


def same_bits(a, b):
    return set(a) == set(b) and all(
        (a[k].dtype, a[k].shape, a[k].tobytes()) == (b[k].dtype, b[k].shape, b[k].tobytes())
        for k in a
    )


def made(goldens, folder, tensors, **more):
    """The small model with other tensors, and further files."""
    shutil.copytree(goldens / "tiny_gqa", folder, ignore=lambda *_: ["model.safetensors"])
    write(folder, tensors.items(), **more)
    return folder


@pytest.fixture(scope="module")
def adapter(goldens, tmp_path_factory):
    """A DoRA adapter that names its base by path."""
    folder = tmp_path_factory.mktemp("adapters") / "dora"
    shutil.copytree(goldens / "adapters/tiny_gqa_dora_r8", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(goldens / "tiny_gqa")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "mixed"])
def test_a_model_comes_out_as_it_went_in(goldens, tmp_path, kind):
    """HF -> ours -> HF, to the bit: every type, copies and buffers included, in shards."""
    tensors = load_file(goldens / "tiny_gqa/model.safetensors")
    types = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
    if kind in types:
        tensors = {name: array.astype(types[kind]) for name, array in tensors.items()}
    elif kind == "mixed":
        tensors = {
            name: array.astype(np.float32 if "norm" in name else ml_dtypes.bfloat16)
            for name, array in tensors.items()
        }
    tensors[WTE] = tensors[EMBED]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(6, np.float32)
    source = made(goldens, tmp_path / "in", tensors, shard_bytes=100_000)
    config = json.loads((source / "config.json").read_text())
    config |= {"torch_dtype": "float32" if kind == "mixed" else kind, "unknown": {"a": [1]}}
    config["auto_map"] = {"AutoConfig": "configuration_phi3_v.Phi3VConfig"}
    (source / "config.json").write_text(json.dumps(config, indent=1))
    (source / "configuration_phi3_v.py").write_text("# code of the checkpoint")
    (source / "LICENSE.md").write_text("terms")
    (source / "README.md").write_text("---\nlicense: mit\nmodel-index:\n- name: x\n---\n# Old\n")
    out = tmp_path / "out"
    assert run(source, "hf", out, "--max_shard_size", "0.1MB") == 0
    assert same_bits(tensors_of(out), tensors)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    kept = {p.name for p in source.iterdir() if p.suffix != ".safetensors"} - {"README.md"}
    for name in kept - {"model.safetensors.index.json"}:
        assert (out / name).read_bytes() == (source / name).read_bytes(), name
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\nlibrary_name: transformers\n") and "Old" not in card


def test_an_adapter_comes_out_as_it_went_in(goldens, adapter, tmp_path):
    """adapter -> ours -> adapter, to the bit, in the type that it has; in names of both kinds."""
    half = tmp_path / "half"
    shutil.copytree(adapter, half, ignore=lambda *_: ["adapter_model.safetensors"])
    tensors = {
        name: array.astype(ml_dtypes.bfloat16)
        for name, array in load_file(adapter / "adapter_model.safetensors").items()
    }
    write(half, tensors.items(), stem="adapter_model")
    for source in (adapter, half):
        out = tmp_path / f"out-{source.name}"
        assert run(source, "peft", out) == 0
        file = "adapter_model.safetensors"
        assert same_bits(load_file(out / file), load_file(source / file))
        before, after = (json.loads((f / "adapter_config.json").read_text()) for f in (source, out))
        assert after == before
        card = (out / "README.md").read_text()
        assert "library_name: peft" in card and "DoRA, rank 8" in card
    out = tmp_path / "five"
    assert run(adapter, "peft", out, "--hf_layout", "5", "--dtype", "bf16") == 0
    five = load_file(out / "adapter_model.safetensors")
    assert all("vision_model" not in name for name in five)
    assert same_bits({n.replace("vision_model.", ""): a for n, a in tensors.items()}, five)
    exported = json.loads((out / "vlm2vec.json").read_text())["exported"]
    assert exported == {"format": "peft", "dtype": "bfloat16", "hf_layout": "5"}
    # And back again: the form in which it came is kept.
    assert run(out, "peft", tmp_path / "again") == 0
    assert same_bits(load_file(tmp_path / "again/adapter_model.safetensors"), five)


def test_an_adapter_on_another_base_is_told(goldens, adapter, tmp_path, capsys):
    base = tmp_path / "elsewhere"
    shutil.copytree(goldens / "tiny_gqa", base)
    moved = tmp_path / "moved"
    shutil.copytree(adapter, moved)
    config = json.loads((moved / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "org/original"
    (moved / "adapter_config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="trained on org/original; it is applied to .*elsewhere"):
        assert run(moved, "merged", tmp_path / "m", "--model", base, "--nomeasure") == 0
    assert run(moved, "peft", tmp_path / "p", "--model", base) == 0
    written = json.loads((tmp_path / "p/adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(base)
    assert run(moved, "merged", tmp_path / "n", "--model", goldens / "tiny_mha") == 2
    assert "another base model" in capsys.readouterr().err and not (tmp_path / "n").exists()


@pytest.mark.slow
def test_merging_says_how_far_the_embeddings_went(adapter, tmp_path, capsys):
    assert run(adapter, "merged", tmp_path / "out", "--dtype", "bf16") == 0
    said = capsys.readouterr().out
    assert "of 5 sample inputs by at most" in said
    largest = float(said.split("at most ")[1].split()[0])
    assert 1e-6 < largest < 0.05  # what bfloat16 does to weights
    with Checkpoint(tmp_path / "out") as checkpoint:
        assert {checkpoint.dtype_name(name) for name in checkpoint.names} == {"BF16"}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    record = json.loads((tmp_path / "out/vlm2vec.json").read_text())
    assert record["adapter"] is None and record["exported"]["adapter"]["use_dora"]


FORM = SentenceTransformers("<|image|>")


def test_the_form_of_sentence_transformers(goldens, adapter, tmp_path, capsys, monkeypatch):
    assert run(adapter, "sentence-transformers", tmp_path / "no") == 2
    said = capsys.readouterr().err
    assert "no class for phi3_v" in said and "--format merged" in said
    assert not (tmp_path / "no").exists()
    # A backbone that has a class there only has to say so.
    other = dataclasses.replace(backbone.BACKBONE, sentence_transformers=FORM)
    monkeypatch.setattr(backbone, "BACKBONE", other)
    out = tmp_path / "st"
    assert run(adapter, "sentence-transformers", out, "--nomeasure") == 0
    read = {p: json.loads((out / p).read_text()) for p in (
        "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json",
        "1_Pooling/config.json", "2_Normalize/config.json", "vlm2vec.json",
    )}  # fmt: skip
    assert [(m["path"], m["type"]) for m in read["modules.json"]] == [
        ("", "sentence_transformers.models.Transformer"),
        ("1_Pooling", "sentence_transformers.models.Pooling"),
        ("2_Normalize", "sentence_transformers.models.Normalize"),
    ]
    assert read["1_Pooling/config.json"]["pooling_mode"] == "lasttoken"
    assert read["1_Pooling/config.json"]["embedding_dimension"] == 48
    modalities = read["sentence_bert_config.json"]["modality_config"]
    assert set(modalities) == {"text", "image", "message"}
    assert modalities["message"]["format"] == "structured"
    assert read["vlm2vec.json"]["adapter"] is None  # DoRA's magnitudes would be lost otherwise
    assert not (out / "adapter_config.json").exists()
    assert same_bits(tensors_of(out), tensors_of(merged(adapter, tmp_path)))


def merged(adapter, tmp_path):
    assert run(adapter, "merged", tmp_path / "merged", "--nomeasure") == 0
    return tmp_path / "merged"


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("2GiB", 2 << 30), ("1.5kb", 1500), (7, 7)],
)
def test_sizes_of_shards(text, size):
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["", "0", "GB", "-5GB", "5 apples", "0.0001B"])
def test_what_is_no_size(text):
    with pytest.raises(UserError, match="5GB"):
        size_of(text)


def test_full_disks_and_existing_folders_through_the_command(goldens, tmp_path, capsys):
    with small_disk(tmp_path / "disk", 1500) as disk:
        assert run(goldens / "tiny_gqa", "hf", disk / "out") == 0
        before = {p.name: p.read_bytes() for p in (disk / "out").iterdir()}
        (disk / "filler").write_bytes(b"x" * 700_000)
        for more, words in (((), "--force"), (("--force",), "No space left")):
            assert run(goldens / "tiny_gqa", "hf", disk / "out", *more) == 2
            said = capsys.readouterr().err
            assert words in said and "Traceback" not in said
            assert {p.name: p.read_bytes() for p in (disk / "out").iterdir()} == before
            assert sorted(p.name for p in disk.iterdir()) == ["filler", "out"]
        (disk / "filler").unlink()
        assert run(goldens / "tiny_gqa", "hf", disk / "out", "--force") == 0
        assert sorted(p.name for p in disk.iterdir()) == ["out"]


# --------------------------------------------------------------------------------------- prompts


class Source:
    """Rows as a `TrainSource` gives them."""

    def __init__(self, subset, queries, targets):
        from vlm2vec_jax.inputs import MultimodalInput

        self.subset = subset
        rows = zip(queries, targets, strict=True)
        self.rows = [
            type("Row", (), {"query": MultimodalInput(q), "positive": MultimodalInput(t)})
            for q, t in rows
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        if row == 1:
            raise UserError("a bad row")
        return self.rows[row]


def test_prompts_are_what_all_texts_open_with():
    image = "<|image_1|> Represent the given image.\n"
    labels = [f"a {colour} thing" for colour in ("red", "green", "grey", "blue", "black")]
    ask = [f"<|image_1|> Answer this question: what is {n}?" for n in range(5)]
    found = prompts_of([Source("A", ask, labels), Source("B", ask, [image] * 5)])
    assert found == {
        "query": "Answer this question: what is ",
        "A/query": "Answer this question: what is ",
        "B/query": "Answer this question: what is ",
        "B/target": "Represent the given image.\n",
    }
    assert common_prompt(["only one two three four"]) == ""
    assert common_prompt([]) == ""


def test_exports_are_used_without_another_word(goldens, adapter, tmp_path):
    """Crops, lengths and prompts of training come from `vlm2vec.json` alone."""
    assert run(adapter, "peft", tmp_path / "first") == 0
    record = json.loads((tmp_path / "first/vlm2vec.json").read_text())
    record["processor"] |= {"num_crops": 3, "max_len": 9}
    record |= {"prompts": {"query": "Find this: "}, "run": "abc", "temperature": 0.02}
    (tmp_path / "first/vlm2vec.json").write_text(json.dumps(record))
    assert run(tmp_path / "first", "merged", tmp_path / "out", "--nomeasure") == 0
    embedder = Embedder.from_pretrained(tmp_path / "out", dtype="float32")
    assert embedder.processor.settings["num_crops"] == 3
    assert embedder.processor.settings["max_len"] == 9
    assert embedder.prompts == {"query": "Find this: "}
    after = json.loads((tmp_path / "out/vlm2vec.json").read_text())
    for name in ("backbone", "pooling", "normalize", "temperature", "processor", "prompts", "base"):
        assert after[name] == record[name]
    assert after["run"] == "abc" and after["exported"]["adapter"]["target_modules"]
    assert after["base"]["identity"]


@pytest.mark.parametrize("backbone, place", [(b, p) for b in VARIANTS for p in (0, 1)])
def test_settings_are_written_for_both_generations(backbone, place, tmp_path):
    """What transformers 5 saved is said as 4.46 has it, and means the same; what 4.46 had stays."""
    folder = GOLDENS / backbone / VARIANTS[backbone][place]
    model = abstract_model(folder)
    before = json.loads((folder / "config.json").read_text())
    if model.table.settings is None:
        assert backbone == "qwen3_vl"  # which 4.46 does not have
        return
    written = model.table.settings(before)
    assert (written == before) == ("dtype" not in before)
    assert "rope_parameters" not in {**written, **written.get("text_config", {})}
    assert ("text_config" in written) == (backbone == "llava_next")
    (tmp_path / "config.json").write_text(json.dumps(written))
    for other in folder.glob("*processor*.json"):
        shutil.copy(other, tmp_path)
    assert model.backbone.read_config(tmp_path) == model.config
