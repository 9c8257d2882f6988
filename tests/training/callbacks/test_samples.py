"""Samples while training: as the settings say, alike after every validation, and gone when they are written."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from litgpt import GPT

from litgpt_moe_ext.training.callbacks import samples
from litgpt_moe_ext.training.callbacks.samples import TextSamples
from litgpt_moe_ext.training.settings import SampleArgs
from tests.models import dense_config, randomize

TOKENIZER = SimpleNamespace(
    eos_id=5,
    encode=lambda text, device: torch.arange(len(text), device=device),
    decode=lambda ids: f"{len(ids)} tokens\n{ids.tolist()}",
)


@pytest.mark.parametrize(("prompt", "returned"), [("abc", 3 + 8), ("a" * 27, 32)])
def test_settings_reach_the_generation(monkeypatch, prompt, returned):
    """Up to the end of the model's context; the same numbers are drawn every time, and the training's go on."""
    given, drawn = [], []

    def generate(model, ids, **settings):
        assert model.transformer.h[0].attn.kv_cache is not None
        given.append(settings)
        drawn.append(torch.rand(()).item())
        if len(drawn) == 3:
            raise RuntimeError("out of luck")
        return ids

    monkeypatch.setattr(samples, "generate", generate)
    printed = []
    model = randomize(GPT(dense_config()))
    writer = TextSamples(SampleArgs([prompt], max_new_tokens=8, temperature=0.3, top_k=7), TOKENIZER)
    fabric = L.Fabric(accelerator="cpu", devices=1)
    monkeypatch.setattr(fabric, "print", printed.append)
    writer.on_after_setup(fabric, SimpleNamespace(module=model))
    writer.on_logged({"loss": 1.0})
    for step in range(3):
        torch.manual_seed(step)
        before = torch.get_rng_state()
        writer.on_logged({"val_loss": 1.0})
        assert torch.equal(torch.get_rng_state(), before)
        assert model.transformer.h[0].attn.kv_cache is None
    assert given == 3 * [{"max_returned_tokens": returned, "temperature": 0.3, "top_k": 7, "eos_id": 5}]
    assert len(set(drawn)) == 1
    assert printed[0].startswith(f"  sample | {len(prompt)} tokens\n         | [0, 1, 2")
    assert "RuntimeError: out of luck" in printed[2]


def test_a_prompt_that_leaves_no_room_is_named():
    writer = TextSamples(SampleArgs(["x" * 32]), TOKENIZER)
    model, fabric = randomize(GPT(dense_config())), L.Fabric(accelerator="cpu", devices=1)
    writer.on_after_setup(fabric, SimpleNamespace(module=model))
    assert "has 32 tokens; it must have 1 to 31" in writer._continue("x" * 32)
    assert "has 0 tokens" in writer._continue("")


def test_what_moves_the_cursor_of_a_terminal_is_shown(monkeypatch):
    monkeypatch.setattr(samples, "generate", lambda model, ids, **settings: ids)
    printed = []
    tokenizer = SimpleNamespace(**vars(TOKENIZER) | {"decode": lambda ids: "\x1b[2J\x00a\rb\tc\u2028ä \ufffd\nd"})
    fabric = L.Fabric(accelerator="cpu", devices=1)
    monkeypatch.setattr(fabric, "print", printed.append)
    writer = TextSamples(SampleArgs(["abc"]), tokenizer)
    writer.on_after_setup(fabric, SimpleNamespace(module=randomize(GPT(dense_config()))))
    writer.on_logged({"val_loss": 1.0})
    assert printed == ["  sample | \\x1b[2J\\x00a\\rb\tc\\u2028ä \ufffd\n         | d"]
