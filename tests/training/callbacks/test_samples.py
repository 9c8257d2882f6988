"""Samples while training: as the settings say, alike after every validation, and gone when they are written."""

from types import SimpleNamespace

import lightning as L
import torch
from litgpt import GPT
from litgpt.generate.base import generate

from litgpt_moe_ext.training.callbacks import samples
from litgpt_moe_ext.training.callbacks.samples import TextSamples
from litgpt_moe_ext.training.settings import SampleArgs
from tests.models import dense_config, randomize

TOKENIZER = SimpleNamespace(
    eos_id=5,
    encode=lambda text: torch.tensor([ord(letter) % 64 for letter in text], dtype=torch.int32),
    decode=lambda ids: f"{len(ids)} tokens\n{ids.tolist()}",
)


def make_writer(monkeypatch, *prompts, **settings):
    """Return what writes samples, of 32 tokens at most, its model, and the list of what it prints."""
    printed, fabric = [], L.Fabric(accelerator="cpu", devices=1)
    monkeypatch.setattr(fabric, "print", printed.append)
    model = randomize(GPT(dense_config()))
    writer = TextSamples(SampleArgs(list(prompts), **settings), TOKENIZER)
    writer.on_after_setup(fabric, SimpleNamespace(module=model))
    return writer, model, printed


def expected_text(model, prompt, new_tokens, **settings):
    """Return what LitGPT's own loop writes after a prompt by itself."""
    ids = TOKENIZER.encode(prompt)
    torch.manual_seed(0)
    model.eval().set_kv_cache(batch_size=1)
    with torch.no_grad():
        text = generate(model, ids, len(ids) + new_tokens, **settings, eos_id=TOKENIZER.eos_id)
    model.clear_kv_cache()
    lines = TOKENIZER.decode(text)
    return f"  sample | {lines}".replace("\n", "\n         | ")


def test_each_prompt_is_continued_as_by_itself(monkeypatch):
    """Up to the end of the model's context, or of the text."""
    prompts = ("abc", "a" * 27, "de", "x" * 27, "fghij")
    writer, model, printed = make_writer(monkeypatch, *prompts, max_new_tokens=8, temperature=0.0)
    whole = expected_text(model, "abc", 8, temperature=0.0)
    monkeypatch.setattr(TOKENIZER, "eos_id", int(whole.split(", ")[5]))
    writer.on_logged({"val_loss": 1.0})
    assert printed == [expected_text(model, prompt, min(8, 32 - len(prompt)), temperature=0.0) for prompt in prompts]
    assert "11 tokens" in whole
    assert "6 tokens" in printed[0]


def test_settings_reach_the_sampling(monkeypatch):
    writer, model, printed = make_writer(monkeypatch, "abc", max_new_tokens=8, temperature=0.3, top_k=7)
    writer.on_logged({"val_loss": 1.0})
    assert printed == [expected_text(model, "abc", 8, temperature=0.3, top_k=7)]


def test_samples_leave_the_training_as_it_was(monkeypatch):
    """They are alike after every validation; the numbers that training draws go on."""
    writer, model, printed = make_writer(monkeypatch, "abc", "de", max_new_tokens=8)
    model.train()
    writer.on_logged({"loss": 1.0})
    assert not printed
    for step in range(2):
        torch.manual_seed(step)
        before = torch.get_rng_state()
        writer.on_logged({"val_loss": 1.0})
        assert torch.equal(torch.get_rng_state(), before)
        assert model.transformer.h[0].attn.kv_cache is None
        assert model.training
    assert printed[:2] == printed[2:]


def test_a_prompt_that_leaves_no_room_is_named(monkeypatch):
    """And one that fails; the others are continued."""
    writer, model, printed = make_writer(monkeypatch, "x" * 32, "abc", "", "d" * 30, max_new_tokens=4, temperature=0.0)

    def failing(model, prompts, settings, is_finished):
        if settings.max_gen_toks == 2:
            raise RuntimeError("out of luck")
        return original(model, prompts, settings, is_finished)

    original = samples.generate
    monkeypatch.setattr(samples, "generate", failing)
    writer.on_logged({"val_loss": 1.0})
    assert "has 32 tokens; it must have 1 to 31" in printed[0]
    assert printed[1] == expected_text(model, "abc", 4, temperature=0.0)
    assert "has 0 tokens" in printed[2]
    assert printed[3] == "  sample | (failed: RuntimeError: out of luck)"


def test_what_moves_the_cursor_of_a_terminal_is_shown(monkeypatch):
    text = "\x1b[2J\x00a\rb\tc\u2028ä \ufffd\nd"
    monkeypatch.setattr(TOKENIZER, "decode", lambda ids: text)
    writer, _, printed = make_writer(monkeypatch, "abc")
    writer.on_logged({"val_loss": 1.0})
    assert printed == ["  sample | \\x1b[2J\\x00a\\rb\tc\\u2028ä \ufffd\n         | d"]
