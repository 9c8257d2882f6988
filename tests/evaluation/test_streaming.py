"""Texts that are written token by token, and the experts that wrote them."""

import pytest
import torch

from litgpt_moe_ext.analysis.routing_capture import record_routing
from litgpt_moe_ext.console.main import main
from litgpt_moe_ext.evaluation.streaming import Sampling, stream
from tests.models import initialized_model, moe_config

PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture
def model():
    return initialized_model(moe_config()).eval()


def test_greedy_is_the_likeliest_token_each_time(model):
    ids = list(PROMPT)
    for _ in range(6):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    written = list(stream(model, PROMPT, 6, Sampling(temperature=0), show_experts=False))
    assert [token.id for token in written] == ids[5:]
    assert all(token.experts is None for token in written)


def test_experts_are_those_of_the_whole_text(model):
    written = list(stream(model, PROMPT, 6, Sampling(temperature=0), show_experts=True))
    text = PROMPT + [token.id for token in written]
    for number, layer in enumerate(record_routing(model, [text], 1, lambda done: None)):
        for i, token in enumerate(written):
            assert sorted(token.experts[number]) == sorted(layer.experts_NK[len(PROMPT) - 1 + i].tolist())
            best = layer.experts_NK[len(PROMPT) - 1 + i, layer.weights_NK[len(PROMPT) - 1 + i].argmax()]
            assert token.experts[number][0] == best


def test_the_context_ends_it(model):
    assert len(list(stream(model, PROMPT, 1000, Sampling(), show_experts=False))) == 32 - len(PROMPT)
    assert model.transformer.h[0].attn.kv_cache is None
    with pytest.raises(ValueError, match="the prompt has 0 tokens"):
        list(stream(model, [], 3, Sampling(), show_experts=False))


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
    lines = iter(["is it so?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert main(arguments) == 0
    assert " yes yes yes" in capsys.readouterr().out
    assert main([*arguments, "--prompt=x", "--show_experts=true", "--layer=2"]) == 2
    assert "layer: 2 must be from 0 to 1" in capsys.readouterr().err
