"""FSDP2 as the strategies set it up, on gloo ranks: what is sharded how, in which dtype, and what it costs."""

import contextlib
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins import MixedPrecision, Precision
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.moe.balancing.metrics import routers_of
from litgpt_moe_ext.training.callbacks.activation_checkpointing import ActivationCheckpointing, Mode
from litgpt_moe_ext.training.optim.make import make_optimizer
from litgpt_moe_ext.training.optim.muon import MuonAdamW
from litgpt_moe_ext.training.optim.parameter_groups import group_parameters
from litgpt_moe_ext.training.parallel import fully_sharded, random_state
from litgpt_moe_ext.training.parallel.facts import facts_of
from litgpt_moe_ext.training.parallel.fully_sharded import FullyShardedStrategy, placement_among
from litgpt_moe_ext.training.phases.checks import check_whole_model
from litgpt_moe_ext.training.settings import DistributedArgs, ParameterGroupArgs, Settings
from tests.models import initialized_model, moe_config
from tests.training.processes import in_ranks


def sharded(name: str, precision: str, nodes: int = 1, **model: Any) -> tuple[FullyShardedStrategy, nn.Module]:
    """Return a strategy of the present ranks and a small model under it."""
    ranks = dist.get_world_size()
    strategy = FullyShardedStrategy(facts_of(name), ranks, nodes, DistributedArgs())
    strategy._precision = Precision() if precision == "32-true" else MixedPrecision(precision, "cpu")
    mesh = init_device_mesh("cpu", (ranks, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    torch.manual_seed(0)
    return strategy, strategy._shard(initialized_model(moe_config(**model)), mesh)


def tokens() -> Tensor:
    return torch.arange(8).view(1, 8) + dist.get_rank()


def mixed_precision() -> dict[str, Any]:
    """One step of bf16-mixed; what the ranks saw on the way."""
    _, model = sharded("fsdp", "bf16-mixed", router_bias_update_rate=0.001)
    seen: dict[str, Any] = {}
    router = next(iter(routers_of(model).values()))
    inside = model.transformer.h[0].attn.qkv
    inside.register_forward_hook(lambda module, args, output: seen.update(block=str(module.weight.dtype)))
    router.register_forward_hook(lambda module, args, output: seen.update(gate=str(module.weight.dtype)))
    norm = model.transformer.h[0].norm_1
    norm.register_forward_hook(lambda module, args, output: seen.update(norm=str(module.weight.dtype)))
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.update(stream=str(args[0].dtype)))
    with CommDebugMode() as counted, torch.autocast("cpu", torch.bfloat16):
        model(tokens()).float().sum().backward()
    counts = {str(operator): count for operator, count in counted.get_comm_counts().items()}
    gradients = [parameter.grad for parameter in model.parameters()]
    return {
        **seen,
        "bias": str(router.e_score_correction_bias.dtype),
        "master": sorted({str(parameter.dtype) for parameter in model.parameters()}),
        "gradients": sorted({str(gradient.dtype) for gradient in gradients if gradient is not None}),
        "gathers": sum(
            count for operator, count in counts.items() if "allgather" in operator or "all_gather" in operator
        ),
        "layers": len(model.transformer.h),
    }


@pytest.mark.parametrize("low", [None, torch.bfloat16, torch.float16])
def test_gradients_of_narrow_blocks_are_added_up_in_float32(low):
    strategy = FullyShardedStrategy(facts_of("fsdp2"), 2, 1, DistributedArgs())
    names = {torch.bfloat16: "bf16-mixed", torch.float16: "16-mixed"}
    strategy._precision = Precision() if low is None else MixedPrecision(names[low], "cpu")
    policy = strategy._block_policy()
    assert (policy.param_dtype, policy.reduce_dtype) == (low, low and torch.float32)


@pytest.mark.slow
def test_mixed_precision_keeps_routers_and_norms_in_float32():
    """With torch's older FSDP the bias and the gate would be bfloat16, silently."""
    for seen in in_ranks(mixed_precision, 2):
        assert seen["bias"] == seen["gate"] == seen["norm"] == seen["stream"] == "torch.float32"
        assert seen["block"] == "torch.bfloat16"
        assert seen["master"] == seen["gradients"] == ["torch.float32"]
        # Each block in forward and backward (the last one is kept or prefetched), the root, all routers, all norms.
        assert seen["gathers"] <= 2 * seen["layers"] + 3


def gradients_under(name: str, nodes: int, recomputed: Mode = "none", layers: int = 2) -> list[Tensor]:
    strategy, model = sharded(name, "32-true", nodes=nodes, n_layer=layers)
    if recomputed != "none":
        ActivationCheckpointing(recomputed).on_before_setup(model)
    with torch.no_grad():
        model(tokens())  # as a validation leaves it
    model(tokens()).float().square().mean().backward()
    norm = strategy.clip_gradients_norm(model, torch.optim.SGD(model.parameters()), max_norm=1.0, norm_type=2.0)
    return [norm, *(parameter.grad.full_tensor() for parameter in model.parameters())]


@pytest.mark.slow
@pytest.mark.parametrize("recomputed", ["full", "selective"])
def test_what_is_computed_again_has_the_same_gradients(recomputed):
    """A router whose weights are there since the validation does more when it is computed again than before."""
    expected = in_ranks(gradients_under, 2, "fsdp2", 1, "none", 1)[0]
    for found in in_ranks(gradients_under, 2, "fsdp2", 1, recomputed, 1):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "nodes"), [("fsdp", 2), ("fsdp_shard_grad_op", 1)])
def test_every_name_gives_the_same_gradients(name, nodes):
    """Also two nodes of two ranks each, which hold the model twice; the norm is a plain tensor."""
    expected = in_ranks(gradients_under, 4, "fsdp2", 1)[0]
    for found in in_ranks(gradients_under, 4, name, nodes):
        assert all(torch.allclose(ours, theirs, atol=1e-6) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["fsdp", "fsdp_shard_grad_op", "fsdp2"])
@pytest.mark.parametrize("prefetch", [False, True])
def test_what_is_gathered_when(monkeypatch, name, prefetch):
    """Blocks are given up after their forward pass, but for one strategy; each may gather the next one's."""
    kept, following = [], []
    block = type(initialized_model(moe_config()).transformer.h[0])

    def shard(module, reshard_after_forward=None, **_options):
        if isinstance(module, block):
            kept.append(not reshard_after_forward)
        return module

    monkeypatch.setattr(fully_sharded, "fully_shard", shard)
    monkeypatch.setattr(block, "set_modules_to_forward_prefetch", lambda _, them: following.extend(them), raising=False)
    strategy = FullyShardedStrategy(facts_of(name), 2, 1, DistributedArgs(forward_prefetch=prefetch or None))
    strategy._precision = Precision()
    model = initialized_model(moe_config())
    ranks = SimpleNamespace(size=lambda _dim: 2)
    strategy._shard(model, {"data_parallel": ranks})
    assert kept == [name == "fsdp_shard_grad_op"] * 2
    assert following == (list(model.transformer.h[1:]) if prefetch else [])


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_norms_are_gathered_in_float32(monkeypatch, kind, precision):
    """For the stream is; in one precision they need no exchange of their own."""
    groups = []
    monkeypatch.setattr(fully_sharded, "fully_shard", lambda module, **options: groups.append((module, options)))
    strategy = FullyShardedStrategy(facts_of("fsdp2"), 2, 1, DistributedArgs())
    strategy._precision = Precision() if precision == "32-true" else MixedPrecision(precision, "cuda")
    model = initialized_model(moe_config(norm_class_name=kind))
    strategy._shard(model, {"data_parallel": SimpleNamespace(size=lambda _dim: 2)})
    norms = [norm for block in model.transformer.h for norm in (block.norm_1, block.norm_2)]
    assert ([options.get("mp_policy") for modules, options in groups if modules == norms] == [None]) == (
        precision == "bf16-mixed"
    )


@pytest.mark.parametrize(("offload", "backend"), [(None, "nccl"), (True, "cpu:gloo,cuda:nccl")])
def test_shards_on_the_cpu_are_exchanged_there(offload, backend):
    strategy = FullyShardedStrategy(facts_of("fsdp2"), 2, 1, DistributedArgs(cpu_offload=offload))
    strategy._process_group_backend = "nccl"
    assert strategy._get_process_group_backend() == backend


@pytest.mark.parametrize(("offload", "policy"), [(None, OffloadPolicy()), (True, CPUOffloadPolicy())])
def test_shards_are_kept_on_the_cpu(monkeypatch, offload, policy):
    seen = []
    monkeypatch.setattr(fully_sharded, "fully_shard", lambda _, offload_policy, **options: seen.append(offload_policy))
    strategy = FullyShardedStrategy(facts_of("fsdp2"), 2, 1, DistributedArgs(cpu_offload=offload))
    strategy._precision = MixedPrecision("bf16-mixed", "cuda")
    strategy._shard(initialized_model(moe_config()), {"data_parallel": SimpleNamespace(size=lambda _dim: 2)})
    assert seen == [policy] * 5  # gates, norms, two blocks, the rest


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_where_the_whole_model_is_made(monkeypatch, device):
    """On the rank's own device, here meta, unless there is no room."""
    strategy = FullyShardedStrategy(facts_of("fsdp2"), 2, 1, DistributedArgs())
    monkeypatch.setattr(FullyShardedStrategy, "root_device", torch.device("meta"))
    strategy._precision = Precision()
    strategy.made_on_cpu = device == "cpu"
    with strategy.module_init_context(empty_init=True):
        assert nn.Linear(1, 1).weight.device.type == device


def test_every_node_has_the_model_once(monkeypatch):
    made, mesh = [], SimpleNamespace(device_type="cpu", size=lambda _dim=0: 8)

    def make(_device_type, shape, mesh_dim_names):
        made.append((shape, mesh_dim_names))
        return mesh

    monkeypatch.setattr(fully_sharded, "init_device_mesh", make)
    monkeypatch.setattr(fully_sharded, "fully_shard", lambda module, **_: module)
    strategy = FullyShardedStrategy(facts_of("fsdp"), 8, 2, DistributedArgs())
    strategy._precision = Precision()
    strategy._shard(initialized_model(moe_config()), mesh)
    assert made == [((2, 4), ("replicate", "shard"))]


class TestPlacement:
    def test_experts(self):
        """Fewer experts than ranks are cut inside, where the size allows it."""
        placement = placement_among(8)
        assert placement(nn.Parameter(torch.empty(8, 16, 16))) is None
        assert placement(nn.Parameter(torch.empty(4, 16, 6))) == Shard(1)
        assert placement(nn.Parameter(torch.empty(4, 6, 16))) == Shard(2)
        assert placement(nn.Parameter(torch.empty(4, 6, 6))) is None
        assert placement(nn.Parameter(torch.empty(4, 16))) is None

    @pytest.mark.slow
    def test_every_rank_has_its_share(self):
        for sizes in in_ranks(expert_shards, 4):
            assert len(set(sizes)) == 1
            assert sizes[0] * 4 == 2 * 2 * 8 * 16


def expert_shards() -> list[int]:
    _, model = sharded("fsdp2", "32-true", n_expert=2, n_expert_per_token=1, n_embd=16, moe_intermediate_size=8)
    local = model.transformer.h[0].mlp.experts.gate_up_proj.to_local().numel()
    sizes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(sizes, local)
    return sizes


def loaded_weights() -> bool:
    """Load a whole model of other numbers into a sharded one."""
    strategy, model = sharded("fsdp2", "32-true")
    torch.manual_seed(1)
    other = initialized_model(moe_config())
    strategy.load_module_state_dict(model, other.state_dict())
    found = {name: v.full_tensor() if isinstance(v, DTensor) else v for name, v in model.state_dict().items()}
    return all(torch.equal(found[name], value) for name, value in other.state_dict().items())


@pytest.mark.slow
def test_initial_weights():
    """As initial_checkpoint_dir gives them to fsdp2."""
    assert in_ranks(loaded_weights, 2) == [True, True]


def saved_after_a_validation(path: str) -> bool:
    """Return whether a checkpoint after a forward pass without a backward one has the weights."""
    strategy, model = sharded("fsdp_shard_grad_op", "32-true")
    expected = {name: value.full_tensor() for name, value in model.named_parameters()}
    with torch.no_grad():
        model(tokens())
    strategy.cluster_environment = SimpleNamespace(global_rank=dist.get_rank)
    strategy.save_checkpoint(path, {"model": model})
    dist.barrier()
    found = torch.load(path)["model"]
    return all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.slow
def test_a_checkpoint_after_a_validation(tmp_path):
    assert in_ranks(saved_after_a_validation, 2, str(tmp_path / "checkpoint")) == [True, True]


def layer_norms(precision: str) -> float:
    """Return the loss of a model with LayerNorm, after a backward pass."""
    _, model = sharded("fsdp2", precision, norm_class_name="LayerNorm", bias=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true"):
        loss = model(tokens()).float().logsumexp(-1).mean()
    loss.backward()
    return loss.item()


@pytest.mark.slow
def test_layer_norms_in_mixed_precision():
    """On a CPU torch's kernel refuses weights in the low precision beside a float32 stream."""
    assert in_ranks(layer_norms, 2, "bf16-mixed") == pytest.approx(in_ranks(layer_norms, 2, "32-true"), abs=2e-2)


def test_states_go_to_their_parameters_whatever_the_order_of_groups():
    """A checkpoint of ddp numbers them by groups, whose order is not that of the model."""
    model = initialized_model(moe_config())
    optimizer = MuonAdamW(group_parameters(model, ParameterGroupArgs(), split_matrices=True))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    named = fully_sharded._by_name(optimizer.state_dict(), model, optimizer)
    for name, parameter in model.named_parameters():
        assert named["state"][name].keys() == optimizer.state[parameter].keys()
        assert all(named["state"][name][key] is value for key, value in optimizer.state[parameter].items())
    assert [len(group["params"]) for group in named["param_groups"]] == [
        len(group["params"]) for group in optimizer.param_groups
    ]
    with pytest.raises(ValueError, match=r"groups have \[\d+, .*\] weights in the checkpoint and \[17\] now"):
        fully_sharded._by_name(optimizer.state_dict(), model, torch.optim.AdamW(model.parameters()))


def muon(experts: int, place: Callable[[Tensor], Tensor]) -> MuonAdamW:
    """Return Muon with stacked experts in the first group and a weight for AdamW in the second, and their gradients."""
    generator = torch.Generator().manual_seed(0)
    groups = [{"params": [], "matrix_parts": 2}, {"params": []}]
    for group, shape in zip(groups, [(experts, 8, 4), (6, 5)], strict=True):
        weight, gradient = (torch.randn(shape, generator=generator) for _ in range(2))
        parameter = nn.Parameter(place(weight))
        parameter.grad = place(gradient)
        group["params"].append(parameter)
    return MuonAdamW(groups, lr=0.1)


def weights(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter.detach() for group in optimizer.param_groups for parameter in group["params"]]


class OnListsOfShards(TorchDispatchMode):
    """Notes the operations on lists of shards, which torch plans anew in every step, and up to 2.12 has not all of."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        lists = [value for value in args if isinstance(value, list | tuple)]
        if any(isinstance(tensor, DTensor) for tensors in lists for tensor in tensors):
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def muon_step(experts: int, dim: int) -> tuple[list[Tensor], int, list[str]]:
    """Return the weights after a step of Muon, how many collectives it took, and operations on lists of shards."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def place(whole: Tensor) -> Tensor:
        return distribute_tensor(whole, mesh, [Shard(dim if whole.dim() == 3 else 0)], src_data_rank=None)

    optimizer = muon(experts, place)
    with CommDebugMode() as counted, OnListsOfShards() as lists:
        optimizer.step()
    return [weight.full_tensor() for weight in weights(optimizer)], sum(counted.get_comm_counts().values()), lists.seen


@pytest.mark.slow
@pytest.mark.parametrize(("experts", "dim"), [(4, 0), *((1, dim) for dim in range(3))])
def test_muon_needs_no_communication_for_whole_experts(experts, dim):
    """With one expert for two ranks, one of them has nothing to do, or both have a part of it."""
    alone = muon(experts, Tensor.clone)
    alone.step()
    for found, collectives, on_lists in in_ranks(muon_step, 2, experts, dim):
        assert all(torch.equal(weight, other) for weight, other in zip(found, weights(alone), strict=True))
        assert (collectives == 0) == (dim == 0)
        assert on_lists == []


def fused_steps() -> dict[str, bool]:
    """Return whether the kernels of optimizers that have fused ones are fused, after a step on shards."""
    _, model = sharded("fsdp2", "32-true")
    fused = {}
    for name in ("Adam", "AdamW", "SGD", "Adagrad"):
        optimizer = make_optimizer({"class_path": name, "init_args": {"lr": 0.1}}, model, ParameterGroupArgs())
        model(tokens()).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        fused[name] = bool(optimizer.defaults["fused"])
    return fused


@pytest.mark.slow
def test_optimizers_are_fused_where_their_kernels_take_shards():
    assert in_ranks(fused_steps, 2) == [{"Adam": True, "AdamW": True, "SGD": False, "Adagrad": False}] * 2


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        ("Adafactor", "changes its states in ways that torch does not support for shards; use another, such as AdamW"),
        ({"class_path": "torch.optim.SGD", "init_args": {"fused": True}}, "has no fused kernel for shards"),
        ("SGD", None),
        ({"class_path": "torch.optim.AdamW", "init_args": {"fused": True}}, None),
    ],
)
def test_optimizers_that_cannot_step_with_shards_are_refused(optimizer, reason):
    settings = Settings(strategy="fsdp2", optimizer=optimizer)
    check_whole_model(settings, whole=True, compiled=False)
    refused = contextlib.nullcontext() if reason is None else pytest.raises(SettingsError, match=f"fsdp2: it {reason}")
    with refused:
        check_whole_model(settings, whole=False, compiled=False)


def scaled_step(overflow: bool) -> tuple[bool, float]:
    """Return whether a float16 step changed the weights, and the scale after it; one rank's gradient overflows."""
    _, model = sharded("fsdp2", "16-mixed")
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model.lm_head.weight.full_tensor().clone()
    with torch.autocast("cpu", torch.float16):
        loss = model(tokens()).float().mean()
    scaler.scale(loss).backward()
    if overflow and dist.get_rank() == 1:
        model.lm_head.weight.grad.to_local().fill_(float("inf"))
    scaler.step(optimizer)
    scaler.update()
    return not torch.equal(before, model.lm_head.weight.full_tensor()), scaler.get_scale()


@pytest.mark.slow
def test_an_overflow_on_one_rank_is_one_on_all():
    assert in_ranks(scaled_step, 2, False) == [(True, 8.0)] * 2
    assert in_ranks(scaled_step, 2, True) == [(False, 4.0)] * 2


def drawn(world_size: int) -> list[Tensor]:
    torch.manual_seed(7)
    random_state.seed_rank(7, dist.get_rank(), world_size)
    return [torch.rand(3), random_state.of_this_rank(torch.device("cpu"))["torch"]]


@pytest.mark.slow
def test_every_rank_draws_its_own_numbers():
    """For dropout and the noise of routers; one process keeps what it drew before."""
    (first, _), (second, _) = in_ranks(drawn, 2, 2)
    assert not torch.equal(first, second)
    torch.manual_seed(7)
    expected = torch.rand(3)
    assert torch.equal(in_ranks(drawn, 1, 1)[0][0], expected)


def saved_states() -> list[Tensor]:
    rank, device = dist.get_rank(), torch.device("cpu")
    streams = random_state.RankStreams(SimpleNamespace(world_size=2, global_rank=rank, step=0, device=device))
    streams.restore_or_seed(seed=7)
    own, saved = random_state.of_this_rank(device), streams.to_save()
    assert saved[rank]["python"] == own["python"]
    return [state["torch"] for state in saved]


@pytest.mark.slow
def test_every_rank_saves_the_streams_of_all():
    first, second = in_ranks(saved_states, 2)
    assert not torch.equal(*first)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_every_rank_and_step_has_a_stream_of_its_own():
    """Of torch and of Python."""
    streams = []
    for rank, step in ((0, 0), (1, 0), (0, 5)):
        torch.manual_seed(7)
        random.seed(7)
        random_state.seed_rank(7, rank, 2, step)
        streams.append((torch.rand(()).item(), random.random()))
    assert [len(set(numbers)) for numbers in zip(*streams, strict=True)] == [3, 3]


def test_an_evaluation_between_two_steps_disturbs_nothing():
    def draw():
        return torch.rand(()).item(), random.random(), np.random.rand()

    fabric, model = SimpleNamespace(device=torch.device("cpu"), autocast=contextlib.nullcontext), nn.Linear(1, 1)
    state, numpy_state = random_state.of_this_rank(fabric.device), np.random.get_state()
    expected = draw()
    random_state.restore(state, fabric.device)
    np.random.set_state(numpy_state)
    for training in (True, False):
        with random_state.undisturbed(fabric, model.train(training)):
            assert not model.training
            draw()
        assert model.training is training
    assert draw() == expected


def test_random_state_is_restored():
    """A rank goes on with its own, and only once."""
    states, expected = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        states.append(random_state.of_this_rank(torch.device("cpu")))
        expected.append((torch.rand(()).item(), random.random()))
    for rank in (1, 0):
        streams = random_state.RankStreams(SimpleNamespace(world_size=2, global_rank=rank, device=torch.device("cpu")))
        streams.resumed = states
        assert streams.to_save() is states
        streams.restore_or_seed(seed=0)
        number = torch.rand(()).item()
        streams.restore_or_seed(seed=0)
        assert (number, random.random()) == expected[rank]
    state = states[0]
    assert not random_state.restore({**state, "cuda": state["torch"]}, torch.device("cpu"))


@pytest.mark.parametrize(("saved", "now"), [(2, 1), (3, 2), (1, 2)])
def test_streams_of_another_number_of_ranks_start_anew(saved, now):
    """And the run says so, with both numbers."""

    def draw():
        return torch.rand(()).item(), random.random()

    def seed():
        torch.manual_seed(7)
        random.seed(7)

    states, said = [random_state.of_this_rank(torch.device("cpu"))] * saved, []
    for rank in range(now):
        seed()
        random_state.seed_rank(1, rank, now, 5)
        expected = draw()
        seed()
        streams = random_state.RankStreams(
            SimpleNamespace(world_size=now, global_rank=rank, step=5, device=torch.device("cpu"), print=said.append)
        )
        streams.resumed = states
        streams.restore_or_seed(seed=1)
        assert draw() == expected
    assert [f"of {saved} process" in line and f"this run has {now}:" in line for line in said] == [True] * now
