"""The model's own code in an export, used as transformers uses its own classes: for fine-tuning, and in its parts."""

import json

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, StaticCache

from litgpt_moe_ext.export.hf.config_json import OWN_SETTINGS
from litgpt_moe_ext.export.hf.write import export_checkpoint
from tests.export.hf.models import CASES, make_checkpoint

TOKENS = torch.randint(97, (4, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["code-moe", "gpt-moe"])
def folder(request, tmp_path):
    make_checkpoint(tmp_path / "checkpoint", *CASES[request.param][1:])
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")
    return tmp_path / "out"


def open_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def test_settings_have_defaults(folder):
    """All that an export writes of the model, so that one of another size can be made from few."""
    written = json.loads((folder / "config.json").read_text()).keys() - {"auto_map", OWN_SETTINGS}
    model = open_model(folder)
    assert [name for name in written if not hasattr(type(model.config)(), name)] == []
    smaller = type(model)(type(model.config)(num_hidden_layers=1, vocab_size=97))
    assert smaller(TOKENS[:1]).logits.shape == (1, 24, 97)


def test_every_weight_that_a_file_lacks_has_a_beginning(folder):
    """transformers 5 makes a model without any, and leaves the rest to these rules."""
    model = open_model(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.apply(model._init_weights)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "sinks")):
            assert torch.equal(parameter, torch.zeros_like(parameter)), name
        elif "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            assert 0.01 < parameter.std() < 0.03, name


def test_losses_of_a_steps_batches_add_up(folder):
    """The trainer of transformers does not divide where a forward pass takes the number of a step's targets."""
    model, labels = open_model(folder), TOKENS.clone()
    labels[0, :9] = -100
    targets = int((labels[:, 1:] != -100).sum())
    whole = model(TOKENS, labels=labels).loss
    parts = [model(TOKENS[i:j], labels=labels[i:j], num_items_in_batch=targets).loss for i, j in ((0, 1), (1, 4))]
    torch.testing.assert_close(sum(parts), whole)


def test_gradients_are_the_same_where_layers_are_computed_again(folder):
    found = []
    for again in (False, True):
        model = open_model(folder).train()
        if again:
            model.gradient_checkpointing_enable()
        passes = 0

        def count(*_):
            nonlocal passes
            passes += 1

        # Not that of the layer, which transformers 5 computes again without its hooks, and not to its end.
        model.model.layers[0].self_attn.register_forward_hook(count)
        output = model(TOKENS, labels=TOKENS)
        output.loss.backward()
        assert (passes, output.past_key_values is None) == (1 + again, again)
        found.append({name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad})
    torch.testing.assert_close(*found)


def test_generation_in_training_mode_is_the_same(folder):
    """A cache that is not used there would leave each new token alone."""
    model = open_model(folder).eval()
    texts = []
    for _ in range(2):
        texts.append(model.generate(TOKENS[:, :8], max_new_tokens=8, do_sample=False, pad_token_id=0).tolist())
        model.train().gradient_checkpointing_enable()
    assert texts[0] == texts[1]


def test_hidden_states_are_those_between_the_layers(folder):
    model = open_model(folder).eval()
    with torch.inference_mode():
        output = model(TOKENS, output_hidden_states=True)
        first, *between, last = output.hidden_states
        assert len(between) == len(model.model.layers) - 1
        torch.testing.assert_close(model.lm_head(last), output.logits)
        rope = model.model._rope(torch.arange(24).expand(4, -1))
        visible = torch.ones(24, 24, dtype=torch.bool).tril().expand(4, -1, -1)
        for layer, before, after in zip(model.model.layers, (first, *between), between, strict=False):
            torch.testing.assert_close(layer(before, rope, visible, None), after)
        assert model(TOKENS).hidden_states is None


def test_a_tuple_for_those_who_ask_for_one(folder):
    model = open_model(folder).eval()
    with torch.inference_mode():
        loss, logits, _ = model(TOKENS, labels=TOKENS, return_dict=False)
        named = model(TOKENS, labels=TOKENS)
    assert (loss, logits.tolist()) == (named.loss, named.logits.tolist())


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_model_without_a_head_keeps_a_cache(folder, name):
    """Which transformers 4 and 5 call otherwise."""
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.inference_mode():
        whole = model(TOKENS, use_cache=False)
        assert whole.past_key_values is None
        cache = model(TOKENS[:, :15]).past_key_values
        rest = model(TOKENS[:, 15:], **{name: cache}).last_hidden_state
    torch.testing.assert_close(rest, whole.last_hidden_state[:, 15:], rtol=1e-4, atol=1e-4)


def test_what_it_does_not_compute_is_refused(folder):
    model = open_model(folder).eval()
    with pytest.raises(ValueError, match="must be a DynamicCache"):
        model(TOKENS[:, :1], past_key_values=StaticCache(model.config, max_cache_len=32))
    with pytest.raises(ValueError, match=r"attention_mask: must have the shape \(batch, keys\)"):
        model(TOKENS, attention_mask=torch.ones(4, 1, 24, 24, dtype=torch.bool).tril())
    cache = model(TOKENS[:, :9]).past_key_values
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="computed again .* switch gradient checkpointing off"):
        model(TOKENS[:, 9:], past_key_values=cache)
