"""A model that somebody makes on their own, without LitGPT's initialisation, is one that learns."""

import math

import pytest
import torch
from litgpt import GPT

from litgpt_moe_ext.moe.layer import MoE
from tests.models import attention_config, moe_config


@pytest.fixture
def dirty_memory(monkeypatch):
    """Let new memory hold what nobody has written."""

    empty = torch.empty

    def dirty(*size, **kwargs):
        made = empty(*size, **kwargs)
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", dirty)


@pytest.mark.parametrize(
    "changes", [{}, {"bias": True, "router_bias": True}, {"router_type": "noisy_topk"}, {"router_type": "hash"}]
)
def test_weights_are_those_that_litgpt_starts_with(changes, dirty_memory):
    torch.manual_seed(0)
    config = moe_config(n_embd=64, moe_intermediate_size=32, **changes)
    layer = MoE(config)
    stds = {"gate.weight": math.sqrt(2 / 5 / 64), "experts.gate_up_proj": math.sqrt(2 / 5 / 64)}
    stds |= {"experts.down_proj": 1 / math.sqrt(64) / 2}
    for name, parameter in layer.named_parameters():
        if name in stds:
            assert parameter.std().item() == pytest.approx(stds[name], rel=0.1)
        elif not name.startswith("shared"):
            assert not parameter.any()


def test_a_plain_loop_of_torch_trains_and_balances(dirty_memory):
    torch.manual_seed(0)
    model = GPT(moe_config(router_bias_update_rate=0.05, attention_class_name="SinkAttention"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids_BT, losses, loads = torch.randint(64, (8, 32)), [], []
    for _ in range(30):
        logits_BTV = model(ids_BT)
        losses.append(torch.nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
        loads.append(model.transformer.h[0].mlp.gate.load_E)
    assert losses[-1] < losses[0] - 0.5
    assert loads[0].min() > 0, "no expert is left out from the start"
    assert model.transformer.h[0].mlp.gate.e_score_correction_bias.abs().max() > 0.05


def test_sinks_start_where_the_configuration_says():
    assert GPT(attention_config(attention_sink_init=-2.0)).transformer.h[0].attn.sinks.tolist() == [-2.0] * 4
