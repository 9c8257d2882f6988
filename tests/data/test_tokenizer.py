import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from litgpt.tokenizer import Tokenizer
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models
from transformers import AutoTokenizer

from litgpt_moe_ext.data.pipeline.encoding import Encoder
from litgpt_moe_ext.data.tokenizer.bpe import EOS_TOKEN, BPESettings, train_bpe
from litgpt_moe_ext.data.tokenizer.files import litgpt_tokenizer as litgpt_tokenizer_files
from litgpt_moe_ext.data.tokenizer.files import read_tokenizer
from litgpt_moe_ext.data.tokenizer.opening import open_as_litgpt, open_for_documents, special_token
from litgpt_moe_ext.data.tokenizer.threads import threads_for_tokenizers
from litgpt_moe_ext.errors import SettingsError
from tests.runs import PATIENCE

TEXTS = ["def read(self, value):\n    return self.value\n" * 3, "for key, value in items.items():\n\tprint(key)\n" * 3]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    train_bpe(TEXTS, BPESettings(290), path)
    return path


@pytest.fixture(scope="module")
def litgpt_tokenizer(directory):
    return Tokenizer(directory)


@pytest.fixture(scope="module")
def hf_tokenizer(directory):
    return AutoTokenizer.from_pretrained(directory)


def test_training_is_deterministic(directory, tmp_path):
    train_bpe(iter(TEXTS), BPESettings(290), tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (directory / name).read_bytes()


@pytest.mark.parametrize("given", [list, iter])
def test_characters_as_frequent_as_others_are_taken_in_their_order(tmp_path, given):
    """The trainer by itself leaves to chance which of them fit."""
    han = [chr(0x4E00 + i) for i in range(100)]
    texts = [" ".join((*han[::-1], han[70], "a" * 30))] * 3
    made = train_bpe(given(texts), BPESettings(256 + 1 + 40, byte_mode="fallback"), tmp_path).get_vocab()
    # A quarter of the room: what is frequent (space, a, one of these), then the first of the others.
    assert {token for token in made if len(token) == 1} == {" ", "a", han[70], *han[:7]}


def test_special_tokens(directory, litgpt_tokenizer, hf_tokenizer):
    assert found(directory, "eos") == 0
    assert litgpt_tokenizer.eos_id == litgpt_tokenizer.bos_id == hf_tokenizer.eos_token_id == 0
    assert litgpt_tokenizer.use_bos is False
    assert hf_tokenizer.unk_token is None
    assert litgpt_tokenizer.vocab_size == len(hf_tokenizer) == 290


def test_bos_and_eos_are_added_on_request_only(litgpt_tokenizer):
    plain = litgpt_tokenizer.encode("x").tolist()
    assert 0 not in plain
    assert litgpt_tokenizer.encode("x", bos=True, eos=True).tolist() == [0, *plain, 0]


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60).filter(lambda text: EOS_TOKEN not in text))
def test_text_round_trips(litgpt_tokenizer, hf_tokenizer, text):
    ids = litgpt_tokenizer.encode(text)
    assert litgpt_tokenizer.decode(ids) == text
    assert hf_tokenizer(text)["input_ids"] == ids.tolist()
    assert hf_tokenizer.decode(ids.tolist()) == text


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(codec="ascii"), max_size=60).filter(lambda text: EOS_TOKEN not in text))
def test_streaming_round_trips(litgpt_tokenizer, text):
    ids = litgpt_tokenizer.encode(text)
    assert "".join(litgpt_tokenizer.decode_stream(iter(ids))) == text
    assert "".join(litgpt_tokenizer.decode_stream(ids.view(-1, 1))) == text


@pytest.mark.parametrize("text", ["a , b . c", "  leading", "trailing \n\n", "don 't", "\r\n\t", "x" * 500, "🙂é"])
def test_nothing_is_cleaned_up(litgpt_tokenizer, hf_tokenizer, text):
    ids = litgpt_tokenizer.encode(text)
    assert litgpt_tokenizer.decode(ids) == hf_tokenizer.decode(ids.tolist()) == text


def test_special_text_in_a_document_stays_text(directory, litgpt_tokenizer):
    text = 'EOS = "<|endoftext|>"\n'
    assert 0 in litgpt_tokenizer.encode(text)  # a prompt may use it
    ids = open_for_documents(directory).encode(text, add_special_tokens=False).ids
    assert 0 not in ids
    assert litgpt_tokenizer.decode(torch.tensor(ids)) == text


def test_the_end_of_a_document_need_not_be_marked_as_special(directory):
    state = json.loads((directory / "tokenizer.json").read_text())
    state["added_tokens"][0]["special"] = False
    encode = Encoder(json.dumps(state), 0, None, np.dtype(np.uint16)).open()
    assert encode(["a <|endoftext|> b", ""]).tolist().count(0) == 2


@pytest.mark.parametrize("as_object", [False, True])
def test_special_tokens_need_not_be_marked_as_such(tmp_path, as_object):
    """They may be named in the configuration alone, whether or not they are put before documents."""
    train_bpe(TEXTS, BPESettings(270, ("<eos>", "<bos>"), bos_token="<bos>"), tmp_path)
    state, config = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("tokenizer", "tokenizer_config"))
    state["added_tokens"][1]["special"] = False
    config["bos_token"] = {"content": "<bos>", "special": True} if as_object else "<bos>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = open_for_documents(tmp_path)
    ids = tokenizer.encode("a <bos> b", add_special_tokens=False).ids
    assert 1 not in ids
    assert tokenizer.decode(ids) == "a <bos> b"


@pytest.mark.parametrize("bos_id", [None, 1, 4])
def test_a_vocabulary_that_writes_the_end_of_a_document_as_text_is_refused(bos_id):
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0), ("b", -1.0), ("<s>", -1.0)]
    encode = Encoder(HFTokenizer(models.Unigram(pieces, 0)).to_str(), 1, bos_id, np.dtype(np.uint16)).open()
    assert encode(["a", "b"]).tolist().count(1) == (4 if bos_id == 1 else 2)
    with pytest.raises(SettingsError, match="text in the document that begins with 'b</s>a' is token '</s>'"):
        encode(["a", "b</s>a"])


def test_a_vocabulary_that_writes_the_beginning_of_a_document_as_text_is_refused():
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0), ("b", -1.0), ("<s>", -1.0)]
    tokenizer = HFTokenizer(models.Unigram(pieces, 0)).to_str()
    assert Encoder(tokenizer, 1, None, np.dtype(np.uint16)).open()(["b<s>a"]).tolist() == [3, 4, 2, 1]
    with pytest.raises(SettingsError, match="begins with 'b<s>a' is token '<s>' to this tokenizer, which begins"):
        Encoder(tokenizer, 1, 4, np.dtype(np.uint16)).open()(["a", "b<s>a"])


def found(directory, kind):
    return special_token(read_tokenizer(directory), kind, directory)


def test_several_special_tokens(tmp_path):
    train_bpe(TEXTS, BPESettings(270, ("<eos>", "<pad>")), tmp_path)
    tokenizer = HFTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert [tokenizer.token_to_id(token) for token in ("<eos>", "<pad>")] == [0, 1]
    assert found(tmp_path, "eos") == 0


def test_smallest_vocabulary(tmp_path):
    assert train_bpe(TEXTS, BPESettings(257), tmp_path).get_vocab_size() == 257
    with pytest.raises(ValueError, match="vocab_size: 256 is too small.* set vocab_size to 257 or more"):
        train_bpe(TEXTS, BPESettings(256), tmp_path)
    with pytest.raises(ValueError, match="special_tokens: .. must name"):
        train_bpe(TEXTS, BPESettings(300, ()), tmp_path)


def test_a_vocabulary_beyond_all_memory():
    """For which the tokenizers library would end the process."""
    with pytest.raises(SettingsError, match="vocab_size: 1000000000 must be at most 10000000; usual are 2048 to"):
        BPESettings(10**9).check()


CHAT = ("<|unknown|>", "<|im_start|>", "<|im_end|>")


@pytest.mark.parametrize("byte_mode", ["level", "fallback"])
def test_own_special_tokens_and_byte_modes(tmp_path, byte_mode):
    settings = BPESettings(350, CHAT, "<|im_end|>", "<|im_start|>", "<|unknown|>", byte_mode)
    train_bpe(TEXTS, settings, tmp_path)
    ours = HFTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert [ours.token_to_id(token) for token in CHAT] == [0, 1, 2]
    assert ours.get_vocab_size() <= 350
    assert len(ours.encode("def read(self, value):").ids) < 12
    assert (found(tmp_path, "bos"), found(tmp_path, "eos")) == (1, 2)
    assert settings.borders() == (2, 1)
    theirs, litgpts = AutoTokenizer.from_pretrained(tmp_path), Tokenizer(tmp_path)
    assert (theirs.unk_token_id, theirs.bos_token_id, litgpts.eos_id) == (0, 1, 2)
    for text in ("def read(self, value):\n", "naïve 🙂 ▁ <0x41>", " a  b\t\r\n", "don't"):
        ids = litgpts.encode(text)
        assert litgpts.decode(ids) == text
        assert theirs(text)["input_ids"] == ids.tolist()
        assert not set(ids.tolist()) & {0, 1, 2}, "nothing is unknown"
    learned = [litgpts.decode(torch.tensor([i])) for i in range(3, ours.get_vocab_size())]
    assert not [text for text in learned if re.search(r"\w\s", text)], "no token goes on behind a word"
    documents = open_for_documents(tmp_path)
    text = "".join(CHAT)
    assert documents.decode(documents.encode(text, add_special_tokens=False).ids) == text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (BPESettings(300, ("<a>", "<a>")), "must name each token once"),
        (BPESettings(300, ("<a>",), eos_token="<b>"), "eos_token: '<b>' must be one of special_tokens .'<a>'.; add it"),
        (BPESettings(300, byte_mode="bits"), "byte_mode: 'bits' must be level or fallback"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        settings.check()


def test_bos_is_asked_for_by_name(tmp_path):
    assert found(without_eos(tmp_path, {"bos_token": "b"}), "bos") == 1
    with pytest.raises(ValueError, match='no beginning-of-sequence token.*add "bos_token"'):
        found(without_eos(tmp_path, {}), "bos")


def without_eos(directory, config, generation=None):
    HFTokenizer(models.BPE({"a": 0, "b": 1}, [])).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def test_special_token_reads_both_files(tmp_path):
    assert found(without_eos(tmp_path, {"eos_token": {"content": "b"}}), "eos") == 1
    assert found(without_eos(tmp_path, {}, {"eos_token_id": [1, 0]}), "eos") == 1


@pytest.mark.parametrize(
    ("config", "generation", "message"),
    [
        ({}, None, 'no end-of-sequence token.*add "eos_token"'),
        ({}, {"eos_token_id": []}, "no end-of-sequence token"),
        ({"eos_token": "</s>"}, None, "names eos_token '</s>', which is not in the vocabulary"),
        ({}, {"eos_token_id": 9}, "names eos_token_id 9, outside the vocabulary"),
        ({}, {"eos_token_id": "0"}, "names eos_token_id '0', outside the vocabulary"),
        ({}, {"eos_token_id": True}, "names eos_token_id True, outside the vocabulary"),
    ],
)
def test_special_token_names_the_fix(tmp_path, config, generation, message):
    with pytest.raises(ValueError, match=message):
        found(without_eos(tmp_path, config, generation), "eos")


def test_damaged_or_missing_files(tmp_path):
    with pytest.raises(ValueError, match="has no tokenizer.json"):
        open_for_documents(tmp_path)
    without_eos(tmp_path, {})
    for content in ("{", f'{{"model_max_length": {"9" * 5000}}}'):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(SettingsError, match="tokenizer_config.json is not valid JSON"):
            found(tmp_path, "eos")


def test_a_tokenizer_without_a_class_is_opened_with_the_fix(directory, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match='names no class; add "tokenizer_class": "PreTrainedTokenizerFast" to it'):
        open_as_litgpt(tmp_path)


def test_a_tokenizer_of_sentencepiece_prepares_no_corpus():
    given = SimpleNamespace(backend="sentencepiece", model_name="llama")
    with pytest.raises(SettingsError, match=r"^tokenizer_dir: the tokenizer 'llama' is a SentencePiece model, .*json"):
        litgpt_tokenizer_files(given)


def test_threads_are_used_inside_and_off_afterwards(monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    monkeypatch.setattr("litgpt_moe_ext.data.tokenizer.threads._parallelism_is_ours", False)
    for _ in range(2):
        with threads_for_tokenizers():
            assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
        assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


def test_the_users_choice_of_threads_stays(monkeypatch):
    monkeypatch.setattr("litgpt_moe_ext.data.tokenizer.threads._parallelism_is_ours", False)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "0")
    with threads_for_tokenizers():
        assert os.environ["TOKENIZERS_PARALLELISM"] == "0"
    assert os.environ["TOKENIZERS_PARALLELISM"] == "0"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_worker_can_encode(tmp_path):
    program = f"""
import os
from litgpt_moe_ext.data.tokenizer.bpe import BPESettings, train_bpe
from litgpt_moe_ext.data.tokenizer.opening import open_for_documents
train_bpe(["some text to learn from"] * 50, BPESettings(280), {str(tmp_path)!r})
tokenizer = open_for_documents({str(tmp_path)!r})
child = os.fork()
if child == 0:
    os._exit(len(tokenizer.encode_batch(["some text"] * 100)) != 100)
raise SystemExit(os.waitpid(child, 0)[1] != 0)
"""
    environment = {key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program],  # Python 3.12 warns of any fork
        capture_output=True,
        text=True,
        env=environment,
        timeout=PATIENCE,
    )
    assert (result.returncode, result.stderr) == (0, "")
