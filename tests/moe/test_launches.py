"""How many operations a forward pass starts: on a GPU, small models wait for launches more than for arithmetic."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from litgpt_moe_ext import padding
from litgpt_moe_ext.moe.layer import SharedExpertMoE
from tests.models import initialized_model, moe_config, randomize

# These only describe memory in another way, or reserve it.
FREE = {
    *("view", "_unsafe_view", "t", "transpose", "expand", "slice", "select", "split", "chunk", "unbind", "detach"),
    *("alias", "unsqueeze", "squeeze", "as_strided", "empty", "empty_like", "empty_strided", "new_empty"),
    "promote_types",
}
GROUPS = {"n_expert_groups": 4, "n_topk_groups": 2, "n_topk_scores_per_group": 1}


class Launches(TorchDispatchMode):
    """Collects the names of all operations that would start a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({"norm_topk_prob": True}, 13),
        ({"router_score_function": "softmax", "norm_topk_prob": True}, 14),
        ({"norm_topk_prob": True, "routed_scaling_factor": 2.5, **GROUPS}, 20),
        ({"router_type": "noisy_topk", "router_importance_loss_coef": 0.0, "router_load_loss_coef": 0.0}, 15),
    ],
    ids=str,
)
def test_a_router_starts_few_kernels(settings, most):
    gate = randomize(SharedExpertMoE(moe_config(**settings))).gate
    x = torch.randn(12, 16, dtype=torch.bfloat16, requires_grad=True)
    with Launches() as launches:
        gate(x)
    assert len(launches.names) <= most, launches.names


def test_a_layer_starts_few_kernels():
    """Eighteen here, two of them operators that start seven kernels on a card: no more than 25 in all."""
    moe = randomize(SharedExpertMoE(moe_config(norm_topk_prob=True, moe_intermediate_size=16)))
    moe.experts.forced_backend = "grouped_mm"
    x = torch.randn(2, 6, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), Launches() as launches:
        moe(x)
    assert len(launches.names) <= 18, launches.names
    assert [name for name in launches.names if name.startswith("expert_")] == ["expert_up", "expert_down"]


def test_a_batch_without_padding_starts_none_for_it(monkeypatch):
    """Whether padding is accepted or not: the same operations, in the same order, beside the look at the ids."""
    model, ids = initialized_model(moe_config()), torch.randint(0, 64, (2, 6))
    names = []
    for accepted in (False, True):
        monkeypatch.setattr(padding, "_accepted", accepted)
        with Launches() as launches:
            model(ids)
        names.append(launches.names)
    assert names[1] == ["ge", "all", "_local_scalar_dense", *names[0]]
