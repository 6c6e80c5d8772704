# SPDX-License-Identifier: Apache-2.0
"""Tokenizers follow `tokenizer.json`, truncate as transformers does, and fail in words."""

import copy
import hashlib
import json
import shutil

import hypothesis
import pytest
from hypothesis import strategies as st
from tokenizers import Tokenizer

from vlm2vec_jax.errors import UserError
from vlm2vec_jax.models.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def folder(goldens):
    return goldens / "tiny_mha"


@pytest.fixture
def own(tmp_path, folder):
    """A copy of the tokenizer's files, and a function that edits one of them."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(folder / name, tmp_path / name)

    def edit(name: str, **changes) -> None:
        value = json.loads((tmp_path / name).read_text())
        value.update(changes)
        (tmp_path / name).write_text(json.dumps(value))

    return tmp_path, edit


def test_golden_texts(goldens, folder):
    tokenizer = load_tokenizer(folder)
    cases = json.loads((goldens / "text_processing/text_processing.json").read_text())
    texts = [case for case in cases["processor_cases"] if not case["images"]]
    assert len(texts) >= 20
    for case in texts:
        assert tokenizer.encode(case["text"], case["max_len"]) == case["input_ids_rle"], case


def test_hash_limit_and_size(folder):
    tokenizer = load_tokenizer(folder)
    data = (folder / "tokenizer.json").read_bytes()
    assert tokenizer.hash == hashlib.sha256(data).hexdigest()
    assert tokenizer.model_max_length == 131072
    assert tokenizer.special_tokens == 1
    assert tokenizer.vocab_size == 685


@hypothesis.given(text=st.text(max_size=40), max_len=st.integers(1, 30))
def test_truncation_is_the_library_s_own(folder, text, max_len):
    """The library truncates by a setting that threads would share; ours must equal it."""
    oracle = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    full = oracle.encode(text).ids
    oracle.enable_truncation(max_len)
    assert tokenizer.encode(text, max_len) == oracle.encode(text).ids
    assert tokenizer.encode(text) == full
    assert tokenizer.encode(text, max_len, truncate=False) == full


def test_the_folder_s_limit_holds_when_none_is_given(own):
    folder, edit = own
    edit("tokenizer_config.json", model_max_length=4)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("A cat and a dog") == [1, 391, 411, 407]
    assert len(tokenizer.encode("A cat and a dog", 5)) == 5
    assert len(tokenizer.encode("A cat and a dog", truncate=False)) == 6
    edit("tokenizer_config.json", model_max_length=1e30)
    assert load_tokenizer(folder).model_max_length is None


def test_saved_truncation_and_padding_do_not_leak_in(own):
    folder, _ = own
    saved = Tokenizer.from_file(str(folder / "tokenizer.json"))
    saved.enable_truncation(3)
    saved.enable_padding(length=50, pad_id=640)
    saved.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder).encode("A cat and a dog") == [1, 391, 411, 407, 360, 452]


def test_llama_classes_follow_the_flags_and_others_the_file(own):
    folder, edit = own
    plain = [391, 411, 407, 360, 452]
    edit("tokenizer_config.json", add_bos_token=False)
    assert load_tokenizer(folder).encode("A cat and a dog") == plain
    assert load_tokenizer(folder).encode("") == []
    edit("tokenizer_config.json", add_bos_token=True, add_eos_token=True, eos_token="</s>")
    both = load_tokenizer(folder)
    assert both.encode("A cat and a dog") == [1, *plain, 2]
    # The text gives way, the special tokens stay.
    assert both.encode("A cat and a dog", 4) == [1, 391, 411, 2]
    with pytest.raises(UserError, match="max_len=1 has no room"):
        both.encode("A cat", 1)
    edit("tokenizer_config.json", add_bos_token=False, tokenizer_class="PreTrainedTokenizerFast")
    assert load_tokenizer(folder).encode("A cat and a dog") == [1, *plain]
    forced = load_tokenizer(folder, tokenizer_class="LlamaTokenizerFast")
    assert forced.encode("A cat and a dog") == [*plain, 2]


def test_without_a_configuration_llama_s_defaults_hold(own):
    folder, _ = own
    (folder / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(folder, tokenizer_class="LlamaTokenizer")
    assert tokenizer.encode("A cat") == [1, 391, 411]
    assert tokenizer.model_max_length is None


def test_left_truncation(own):
    folder, edit = own
    edit("tokenizer_config.json", truncation_side="left")
    assert load_tokenizer(folder).encode("A cat and a dog", 3) == [1, 360, 452]
    edit("tokenizer_config.json", truncation_side="middle")
    with pytest.raises(UserError, match="truncation_side"):
        load_tokenizer(folder)


def test_flags_of_added_tokens_in_the_configuration_win(own):
    folder, edit = own
    text = "<|user|>  x"
    stripped = load_tokenizer(folder).encode(text)
    listed = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    listed["650"]["rstrip"] = False
    edit("tokenizer_config.json", added_tokens_decoder=listed)
    kept = load_tokenizer(folder).encode(text)
    assert stripped[:2] == kept[:2] == [1, 650]
    assert len(kept) > len(stripped)


def test_files_that_do_not_belong_together(own):
    folder, edit = own
    edit("tokenizer_config.json", added_tokens_decoder={"9000": {"content": "<new>"}})
    with pytest.raises(UserError, match="do not belong together"):
        load_tokenizer(folder)
    edit("tokenizer_config.json", added_tokens_decoder={"x": {}})
    with pytest.raises(UserError, match="malformed"):
        load_tokenizer(folder)


def test_missing_begin_token(own):
    folder, edit = own
    edit("tokenizer_config.json", bos_token={"content": "<begin>"})
    with pytest.raises(UserError, match="bos_token .'<begin>'. is not in the vocabulary"):
        load_tokenizer(folder)


def test_files_that_are_not_there_or_broken(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(UserError, match="has no tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(UserError, match="SentencePiece.*save_pretrained"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json is not a tokenizer"):
        load_tokenizer(tmp_path)


def test_broken_configuration(own):
    folder, edit = own
    edit("tokenizer_config.json", model_max_length="long")
    with pytest.raises(UserError, match="model_max_length"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("[1")
    with pytest.raises(UserError, match="tokenizer_config.json cannot be read as JSON"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(UserError, match="must hold a JSON object"):
        load_tokenizer(folder)


def test_half_a_surrogate_pair_is_no_text(folder):
    with pytest.raises(UserError, match="not a valid Unicode text"):
        load_tokenizer(folder).encode("x \ud83d")


def test_it_can_be_sent_to_a_worker(folder):
    tokenizer = load_tokenizer(folder)
    assert copy.deepcopy(tokenizer).encode("A cat") == tokenizer.encode("A cat")


def test_ids_equal_transformers_fast_tokenizer(folder):
    transformers = pytest.importorskip("transformers")
    oracle = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    for text in ("A cat and a dog", "", "  x\n", "<|user|>\nHi<|end|>\n", "caf\u00e9 \u4f60"):
        assert tokenizer.encode(text) == oracle(text).input_ids
