"""How many operations a forward pass starts: on a GPU, small models wait for launches more than for arithmetic."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from litgpt_moe_ext.moe.layer import SharedExpertMoE
from tests.models import moe_config, randomize

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


def test_a_layer_starts_few_kernels_besides_its_experts_products():
    moe = randomize(SharedExpertMoE(moe_config(norm_topk_prob=True, moe_intermediate_size=16)))
    moe.experts.forced_backend = "grouped_mm"
    x = torch.randn(2, 6, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), Launches() as launches:
        moe(x)
    names = [name for name in launches.names if name not in ("_grouped_mm", "silu")]
    assert len(names) <= 25, names
