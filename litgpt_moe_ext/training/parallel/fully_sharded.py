"""torch's FSDP2: every rank holds a shard of each parameter and gathers a block's parameters when it computes it.

Three strategy names use it. `fsdp2` shards among all ranks; `fsdp` among the ranks of a node, with every node holding
the whole model (HSDP); `fsdp_shard_grad_op` keeps gathered parameters from forward to backward pass.

torch's older FSDP is not used: Fabric has it keep all buffers in the low precision, in which a balancing bias stops
moving, and an optimizer or average sees its flat parameters instead of matrices.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from itertools import chain
from typing import Any

import torch
from lightning.fabric.strategies import ModelParallelStrategy, Strategy
from litgpt.model import RMSNorm
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.optim import Optimizer

from litgpt_moe_ext.moe.balancing.metrics import routers_of
from litgpt_moe_ext.training.checkpoint.io import DirectCheckpointIO
from litgpt_moe_ext.training.optim.shards import is_shard, shard_like
from litgpt_moe_ext.training.parallel.behaviour import Behaviour, in_model_layout
from litgpt_moe_ext.training.parallel.facts import StrategyFacts
from litgpt_moe_ext.training.settings import DistributedArgs

_BLOCK_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class FullyShardedStrategy(Behaviour, ModelParallelStrategy):
    """FSDP2 behind the calls of LitGPT's loop.

    In mixed precision, blocks are gathered in the low precision, which halves the traffic, and their gradients are
    reduced in float32. Embeddings, norms, the output head and the routers are gathered in float32, so that the residual
    stream and the choice of experts equal those of a single process. Sinks are not, as they share a module with the
    projections.

    Args:
        facts: The strategy's row of the table of facts.
        processes: Number of ranks on all nodes.
        nodes: Number of nodes.
        args: The options.
    """

    def __init__(self, facts: StrategyFacts, processes: int, nodes: int, args: DistributedArgs) -> None:
        super().__init__(
            parallelize_fn=self._shard,
            data_parallel_size=processes,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            timeout=timedelta(minutes=args.timeout_minutes),
        )
        self.facts = facts
        self.made_on_cpu = False
        self._replicas = nodes if facts.within_node else 1
        self._args = args

    def _get_process_group_backend(self) -> str:
        backend = super()._get_process_group_backend()
        if self._args.cpu_offload and backend == "nccl":
            # The gradient norm, and whole tensors for checkpoints, are computed from shards on the CPU.
            return "cpu:gloo,cuda:nccl"
        return backend

    def module_init_context(self, empty_init: bool | None = None) -> AbstractContextManager:
        """Return the context in which a whole model is made."""
        # Sharded before they are initialised, shards on a CPU would get the same random numbers on every rank. Made
        # whole and then sharded, the weights are those of a single process.
        context = Strategy.module_init_context(self, empty_init)
        return _on_cpu(context) if self.made_on_cpu else context

    def _shard(self, model: Any, mesh: DeviceMesh) -> Any:
        if self._replicas > 1:
            shape = (self._replicas, mesh.size() // self._replicas)
            ranks = init_device_mesh(mesh.device_type, shape, mesh_dim_names=("replicate", "shard"))
        else:
            ranks = mesh["data_parallel"]
        options: dict[str, Any] = {
            "mesh": ranks,
            "offload_policy": CPUOffloadPolicy() if self._args.cpu_offload else OffloadPolicy(),
            "shard_placement_fn": placement_among(ranks.size(-1)),
        }
        gates: list[nn.Module] = [
            router for router in routers_of(model).values() if any(True for _ in router.parameters())
        ]
        if gates:
            # One all-gather for the small gates of all layers. Nothing changes their values in place.
            warnings.filterwarnings("ignore", r"FSDP2-wrapped module \([^)]*Router[^)]*\) returned a view")
            fully_shard(gates, reshard_after_forward=False, **options)
        blocks = list(model.transformer.h)
        in_blocks = self._block_policy()
        norms = _norms_of(blocks) if in_blocks.param_dtype is not None else []
        if norms:
            # Torch's fused norm kernels need weights in the dtype of the stream; on a CPU its LayerNorm has no other.
            fully_shard(norms, reshard_after_forward=False, **options)
        for block in blocks:
            keep = self.facts.communication == "model"
            fully_shard(block, mp_policy=in_blocks, reshard_after_forward=not keep, **options)
        if self._args.forward_prefetch:
            for block, following in zip(blocks, blocks[1:], strict=False):
                block.set_modules_to_forward_prefetch([following])
        return fully_shard(model, **options)

    def _block_policy(self) -> MixedPrecisionPolicy:
        dtype = _BLOCK_DTYPES.get(self.precision.precision)
        # Autocast casts the inputs, as in a single process.
        return MixedPrecisionPolicy(dtype, torch.float32 if dtype is not None else None, cast_forward_inputs=False)

    def save_checkpoint(self, path: Any, state: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Save as Lightning does, which looks for shards among the parameters of the models in `state`."""
        # After a validation, which has no backward pass, parameters may still be gathered.
        for value in state.values():
            for module in value.modules() if isinstance(value, nn.Module) else ():
                if isinstance(module, FSDPModule):
                    module.reshard()
        super().save_checkpoint(path, state, *args, **kwargs)

    @property
    def checkpoint_io(self) -> DirectCheckpointIO:  # pyrefly: ignore[bad-override]: nobody exchanges it
        """How checkpoints are read; Lightning itself writes those of sharded models."""
        return DirectCheckpointIO(mmap=True)

    def load_checkpoint(  # pyrefly: ignore[bad-override]: Lightning's needs a `state` with a model as well
        self, path: Any, state: dict[str, Any], strict: bool = True, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load whole tensors from one file, written under any strategy; every rank must call this."""
        # Lightning assumes that unnamed optimizer states are in the order of the model's parameters, not of the
        # optimizer's groups, and refuses a model whose shards and buffers are on different devices.
        optimizers = {name: value for name, value in state.items() if isinstance(value, Optimizer)}
        others = {name: value for name, value in state.items() if name not in optimizers}
        (model,) = (value for value in others.values() if isinstance(value, nn.Module))
        rest = Strategy.load_checkpoint(self, path, others, strict, weights_only)
        state.update(others)
        whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=strict)
        for name, optimizer in optimizers.items():
            saved = _by_name(rest.pop(name), model, optimizer)
            if any(saved["state"].values()):
                set_optimizer_state_dict(model, optimizer, saved, options=whole)
            else:
                # Torch finds the device from the states, but SGD without momentum has none.
                own = optimizer.state_dict()["param_groups"]
                pairs = zip(saved["param_groups"], own, strict=True)
                groups = [{**group, "params": now["params"]} for group, now in pairs]
                optimizer.load_state_dict({"state": {}, "param_groups": groups})
        return rest

    def load_module_state_dict(self, module: nn.Module, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Load whole weights, present on every rank, into a sharded model; every rank copies its shards."""
        loaded = in_model_layout(module, state_dict, strict)
        with torch.no_grad():
            for name, value in module.state_dict().items():
                value.copy_(shard_like(loaded[name], value))

    def clip_gradients_norm(self, *args: Any, **kwargs: Any) -> Tensor:
        """Clip as Lightning does; return the norm over all shards as a plain tensor."""
        norm = super().clip_gradients_norm(*args, **kwargs)
        return norm.full_tensor() if is_shard(norm) else norm


@contextlib.contextmanager
def _on_cpu(context: AbstractContextManager) -> Iterator[None]:
    with context, torch.device("cpu"):
        yield


def _by_name(saved: dict[str, Any], model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return a saved state of an optimizer with the same groups, keyed by parameter names."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    now = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    before = [group["params"] for group in saved["param_groups"]]
    if (sizes := [len(group) for group in before]) != [len(group) for group in now]:
        raise ValueError(f"the optimizer's groups have {sizes} weights in the checkpoint and {list(map(len, now))} now")
    name_of = dict(zip(chain(*before), chain(*now), strict=True))
    groups = [{**group, "params": params} for group, params in zip(saved["param_groups"], now, strict=True)]
    return {"state": {name_of[key]: state for key, state in saved["state"].items()}, "param_groups": groups}


def _norms_of(blocks: list[nn.Module]) -> list[nn.Module]:
    kinds = (RMSNorm, nn.LayerNorm)
    found = [module for block in blocks for module in block.modules() if isinstance(module, kinds)]
    return [norm for norm in found if any(True for _ in norm.parameters())]


def placement_among(ranks: int) -> Callable[[nn.Parameter], Shard | None]:
    """Return FSDP2's `shard_placement_fn` for experts stacked along the first dimension, (E, ..., ...).

    With fewer experts than ranks, sharding by expert would give some ranks a whole expert and others only padding. Then
    the next dimension divisible by the number of ranks is sharded instead.

    Args:
        ranks: Number of ranks that share a parameter.
    """

    def placement(parameter: nn.Parameter) -> Shard | None:
        if parameter.dim() != 3 or parameter.size(0) >= ranks:
            return None
        return next((Shard(dim) for dim in (1, 2) if parameter.size(dim) % ranks == 0), None)

    return placement
