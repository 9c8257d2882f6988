"""DDP exchanges gradients that autograd has not seen as it exchanges those of its own passes."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch import nn

from litgpt_moe_ext.moe.balancing.metrics import routers_of
from litgpt_moe_ext.training.parallel.strategies import ReplicatedStrategy
from litgpt_moe_ext.training.settings import DistributedArgs
from litgpt_moe_ext.training.steps.graphs.graphed_loss import GraphedLoss, GraphOptions
from tests.models import initialized_model, moe_config
from tests.training.processes import in_ranks
from tests.training.steps.graphs.passes import Recordings, Reruns

STEPS = 6


class Failing(Reruns):
    """Cannot capture on the second rank."""

    def passes(self, *arguments, **options):
        if dist.get_rank() == 1:
            raise RuntimeError("not here")
        return super().passes(*arguments, **options)


def rows_of(step):
    """Return the rows of a step's micro-batches: on the second rank some of another shape, which run without graphs."""
    return 1 if step == 4 and dist.get_rank() == 1 else 2


def trained(make_capture, accumulation, view, config):
    """Return what is said, the losses and norms, and what the model and its routers hold; (text, list, list)."""
    args = DistributedArgs(bucket_mb=0.01, gradient_as_bucket_view=view)
    strategy = ReplicatedStrategy("cpu", args)
    strategy.parallel_devices = [torch.device("cpu")]
    torch.manual_seed(0)
    model = initialized_model(moe_config(**{"padded_vocab_size": 64, "router_bias_update_rate": 0.01} | config))
    ddp, said, numbers = strategy.setup_module(model), [], []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(3 + dist.get_rank())
    torch.manual_seed(1 + dist.get_rank())

    def loss_of(module, ids, targets):
        return nn.functional.cross_entropy(module(ids).flatten(0, 1), targets.flatten())

    def graphed(ids, targets):
        return strategy.in_place_of_forward(passes, ids, targets)

    how = GraphOptions(careful=True, exchange=strategy.exchange_gradients, make_capture=make_capture or Reruns)
    passes = GraphedLoss(lambda ids, targets: loss_of(model, ids, targets), ddp, said.append, how)
    for step in range(STEPS):
        for i in range(accumulation):
            batch = torch.randint(0, 64, (rows_of(step), 17), generator=generator)
            with ddp.no_sync() if i + 1 < accumulation else contextlib.nullcontext():
                ids, targets = batch[:, :-1], batch[:, 1:]
                loss = graphed(ids, targets) if make_capture else loss_of(ddp, ids, targets)
                (loss / accumulation).backward()
            numbers.append(loss.detach())
        numbers.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad()
    loads = [router.record for router in routers_of(model).values()]
    return "\n".join(said), numbers, [*model.state_dict().values(), *loads]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make_capture", "accumulation", "view", "config"),
    [
        (Recordings, 2, False, {"expert_backend": "grouped_mm", "moe_intermediate_size": 16}),
        (Reruns, 1, True, {"expert_dropout": 0.1, "router_type": "hash", "router_bias_update_rate": None}),
        (Failing, 2, None, {}),
    ],
    ids=["a step of two", "views of buckets", "one rank fails"],
)
def test_ranks_train_as_under_ddp_alone(make_capture, accumulation, view, config):
    ours, theirs = (in_ranks(trained, 2, make, accumulation, view, config) for make in (make_capture, None))
    on, off = "CUDA graphs: on, from this step", "CUDA graphs: off (capturing failed: not here)"
    assert [said for said, *_ in ours] == [on, off if make_capture is Failing else on]
    for (_, numbers, state), (_, expected_numbers, expected_state) in zip(ours, theirs, strict=True):
        assert numbers == expected_numbers
        assert all(torch.equal(a, b) for a, b in zip(state, expected_state, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ours[0][2], ours[1][2], strict=True))


def test_a_pass_that_fails_leaves_the_module_as_it_was():
    """Before DDP has come to the module, whose `forward` may be one of its own."""

    class Refusing(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            raise RuntimeError("buckets")

    def own(x):
        return x

    strategy = ReplicatedStrategy("cpu", DistributedArgs())
    for forward in ({}, {"forward": own}):
        module = nn.Linear(1, 1)
        vars(module).update(forward)
        strategy._replica = Refusing(module)
        with pytest.raises(RuntimeError, match="buckets"):
            strategy.in_place_of_forward(torch.relu, torch.zeros(1))
        assert vars(module).get("forward") is forward.get("forward")
