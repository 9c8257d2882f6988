"""Texts that are written token by token, and the experts that wrote them."""

import io

import pytest
import torch

from litgpt_moe_ext.cli.commands.chat import COLORS, TextPieces, style_of
from litgpt_moe_ext.cli.main import main
from litgpt_moe_ext.evaluation.loading import load_tokenizer
from litgpt_moe_ext.evaluation.sampling import Sampling
from litgpt_moe_ext.evaluation.streaming import stream
from litgpt_moe_ext.inspect.experts.capture import record_routing
from litgpt_moe_ext.inspect.experts.streaming import with_experts
from tests.models import initialized_model, moe_config

PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture
def model():
    return initialized_model(moe_config()).eval()


def test_greedy_is_the_likeliest_token_each_time(model):
    ids = list(PROMPT)
    for _ in range(6):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert list(stream(model, PROMPT, 6, Sampling(temperature=0))) == ids[5:]


def test_experts_are_those_of_the_whole_text(model):
    written = list(with_experts(model, stream(model, PROMPT, 6, Sampling(temperature=0))))
    text = PROMPT + [token.id for token in written]
    for number, layer in enumerate(record_routing(model, [text], 1, lambda done: None)):
        for i, token in enumerate(written):
            assert sorted(token.experts[number]) == sorted(layer.experts_NK[len(PROMPT) - 1 + i].tolist())
            best = layer.experts_NK[len(PROMPT) - 1 + i, layer.weights_NK[len(PROMPT) - 1 + i].argmax()]
            assert token.experts[number][0] == best


def test_the_context_ends_it(model):
    assert len(list(stream(model, PROMPT, 1000, Sampling()))) == 32 - len(PROMPT)
    assert model.transformer.h[0].attn.kv_cache is None
    with pytest.raises(ValueError, match="prompt: it is empty"):
        list(stream(model, [], 3, Sampling()))
    with pytest.raises(ValueError, match=r"prompt: it has 32 tokens; it must have 1 to 31 \(the model's context\)"):
        list(stream(model, [1] * 32, 3, Sampling()))


def test_a_streaming_cache_has_no_end():
    settings = {"attention_class_name": "SinkAttention", "streaming_cache_first": 2, "streaming_cache_window": 20}
    model = initialized_model(moe_config(**settings)).eval()
    for prompt in (PROMPT, [1] * 50):
        assert len(list(stream(model, prompt, 100, Sampling()))) == 100
    assert model.max_seq_length == 32


@pytest.mark.parametrize("setting", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.5}])
def test_wrong_settings_are_named(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        Sampling(**setting)


def test_command(moe_dir, capsys, monkeypatch):
    # The checkpoint answers " yes" whatever it reads.
    arguments = ["chat", str(moe_dir), "--max_new_tokens=3", "--temperature=0"]
    assert main([*arguments, "--prompt=is it so?"]) == 0
    assert " yes yes yes" in capsys.readouterr().out
    assert main([*arguments, "--prompt=is it so?", "--show_experts=true"]) == 0
    out = capsys.readouterr().out
    assert " yes yes yes" in out
    assert "first choice in MoE layer 1" in out
    # Bytes that are no text, a prompt that is too long, and the end of the input.
    typed = io.TextIOWrapper(io.BytesIO(b"\xff\n" + b"the fox " * 40 + b"\nis it so?\n"))
    monkeypatch.setattr("sys.stdin", typed)
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert out.count(" yes yes yes") == 2
    assert "error: prompt: it has " in out
    assert main([*arguments, "--prompt=x", "--show_experts=true", "--layer=2"]) == 2
    assert "layer: 2 must be from 0 to 1" in capsys.readouterr().err


def test_characters_are_printed_whole(moe_dir):
    processor = load_tokenizer(moe_dir).processor
    text = "so? \u00e9\u20ac\U0001f600 yes"
    ids = processor.encode(text).ids
    pieces = TextPieces(processor.decode, ids[:1])
    printed = [pieces.add(token) for token in ids[1:]]
    assert "".join(printed) + pieces.rest() == text.removeprefix(processor.decode(ids[:1]))
    assert not any("\ufffd" in piece for piece in printed)
    assert printed.count("") >= 1 + 2 + 3  # the first bytes of the three characters
    # Bytes that never become a character are not waited for.
    half = processor.encode("\U0001f600").ids[0]
    pieces = TextPieces(processor.decode, ids)
    assert [pieces.add(half) for _ in range(3)] == ["", "", ""]
    assert set(pieces.add(half)) == {"\ufffd"}
    assert pieces.add(half) == ""
    assert pieces.rest() == "\ufffd"
    assert pieces.rest() == ""


def test_blanks_between_words_stay():
    # As with tokenizers that drop the blank at the beginning of a text.
    words = {1: " is", 2: " it", 3: " so"}
    pieces = TextPieces(lambda ids: "".join(words[i] for i in ids).removeprefix(" "), [1])
    assert [pieces.add(2), pieces.add(3)] == [" it", " so"]


def test_every_expert_has_its_own_style():
    assert len({style_of(expert) for expert in range(4 * len(COLORS))}) == 4 * len(COLORS)


def test_what_a_terminal_would_obey_is_shown(moe_dir, capsys, monkeypatch):
    monkeypatch.setattr(TextPieces, "add", lambda self, token: "\x1b[2J\ta:smile:[red]\n")
    assert main(["chat", str(moe_dir), "--prompt=is it so?", "--max_new_tokens=1"]) == 0
    assert capsys.readouterr().out == "\u241b[2J\ta:smile:[red]\n\n"
