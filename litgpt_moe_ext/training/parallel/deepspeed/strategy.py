"""Fabric's DeepSpeed strategy, for a loop that sets up the model first and the optimizer after it."""

import contextlib
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.strategies import DeepSpeedStrategy, Strategy
from lightning.fabric.strategies.strategy import _BackwardSyncControl
from litgpt.args import TrainArgs
from torch import Tensor, nn
from torch.optim import Optimizer

from litgpt_moe_ext.training.callback import Callback
from litgpt_moe_ext.training.checkpoint.io import DirectCheckpointIO
from litgpt_moe_ext.training.parallel.behaviour import Behaviour, in_model_layout
from litgpt_moe_ext.training.parallel.deepspeed.optimizer import ZeroOptimizer
from litgpt_moe_ext.training.parallel.deepspeed.settings import engine_options, step_options
from litgpt_moe_ext.training.parallel.facts import StrategyFacts
from litgpt_moe_ext.training.settings import DistributedArgs

_WORKING_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "32-true": torch.float32}


class ZeroStrategy(Behaviour, DeepSpeedStrategy):
    """DeepSpeed's ZeRO behind the calls of LitGPT's loop.

    DeepSpeed wants model and optimizer at once, with the number of micro-batches and the largest gradient norm in its
    configuration. Call `follow` before the model is set up and `attach_optimizer` when the optimizer is made;
    `setup_module` only prepares the model.

    Checkpoints hold whole tensors, as those of ddp do.

    Args:
        facts: The strategy's row of the table, which has the stage.
        args: The options.
    """

    clips_in_step = True
    steps_in_parts = True
    compile_obstacle = "DeepSpeed works on the model as it is"

    def __init__(self, facts: StrategyFacts, args: DistributedArgs) -> None:
        super().__init__(**engine_options(facts, args), timeout=timedelta(minutes=args.timeout_minutes))
        self.facts = facts
        self._checkpoint_io = DirectCheckpointIO(mmap=True)
        self._backward_sync_control = _StepBoundary()
        self._optimizer: ZeroOptimizer

    @property
    def scales_gradients(self) -> bool:
        """Whether the loss is scaled against underflow."""
        return self.precision.precision == "16-mixed"

    def use_precision(self, name: str, accelerator: str) -> None:
        """Leave the precision to Fabric, which has DeepSpeed's own."""

    def module_init_context(self, empty_init: bool | None = None) -> contextlib.AbstractContextManager:
        """Return the context in which a whole model is made."""
        # DeepSpeed would shard the weights before LitGPT has given them values.
        return Strategy.module_init_context(self, empty_init)

    def loss_scale_state(self) -> "LossScale":
        """Return what keeps DeepSpeed's loss scale in the checkpoints."""
        return LossScale(self)

    def follow(self, train: TrainArgs) -> None:
        """Have DeepSpeed accumulate and clip as LitGPT's loop means it; processes must be connected already."""
        accumulation = train.gradient_accumulation_iters(self.world_size)
        options = step_options(train.micro_batch_size, accumulation, train.max_norm, self.precision.precision)
        self.config = {**(self.config or {}), **options}

    # pyrefly: ignore[bad-override]  DeepSpeed's engine comes later, in `attach_optimizer`
    def setup_module(self, module: nn.Module) -> nn.Module:
        """Convert the parameters to the precision that DeepSpeed trains in."""
        # What DeepSpeed will do as well. Done here, callbacks see the model as it will train. Buffers keep their dtype.
        for parameter in module.parameters():
            parameter.data = parameter.data.to(_WORKING_DTYPES[self.precision.precision])
        return module

    def attach_optimizer(self, model: Any, optimizer: Optimizer, on_norm: Callable[[Tensor], None]) -> ZeroOptimizer:
        """Hand model and optimizer over to DeepSpeed, whose engine runs the model from now on."""
        members = [list(group["params"]) for group in optimizer.param_groups]
        engine, _, _ = self.setup_module_and_optimizers(model.module, [optimizer])
        model._forward_module = engine
        self._optimizer = ZeroOptimizer(engine, members, on_norm)
        return self._optimizer

    def backward(self, tensor: Tensor, module: Any, *args: Any, **kwargs: Any) -> None:
        """Compute gradients of a loss that the loop has divided by the number of micro-batches."""
        module.backward(tensor, *args, scale_wrt_gas=False, **kwargs)

    def save_checkpoint(self, path: str | Path, state: dict, storage_options: Any = None, filter: Any = None) -> None:
        """Save whole tensors in one file; every rank must call."""
        Strategy.save_checkpoint(self, path, state, storage_options, filter)

    def load_checkpoint(
        self, path: str | Path, state: Any = None, strict: bool = True, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load whole tensors from one file; every rank must call."""
        return Strategy.load_checkpoint(self, path, state, strict, weights_only)

    def get_module_state_dict(self, module: Any) -> dict[str, Tensor]:
        """Return whole float32 weights and the buffers, on the CPU of the first rank; every rank must call."""
        whole: dict[int, Tensor] = {}
        result = {}
        for name, value in module.module.state_dict(keep_vars=True).items():
            if id(value) not in whole:  # tied weights are one tensor under two names
                tensor = self._optimizer.shards.gather(value) if isinstance(value, nn.Parameter) else value.detach()
                whole[id(value)] = tensor.to("cpu", copy=True) if self.is_global_zero else tensor.new_empty(0)
            result[name] = whole[id(value)]
        return result

    def load_module_state_dict(self, module: Any, state_dict: Mapping[str, Tensor], strict: bool = True) -> None:
        """Give the model other weights, whole ones, that every rank has; every rank must call."""
        network = module.module
        loaded = in_model_layout(network, state_dict, strict)
        shards = self._optimizer.shards
        with torch.no_grad():
            for name, value in network.state_dict(keep_vars=True).items():
                if isinstance(value, nn.Parameter):
                    shards.scatter(value, loaded[name])
                    shards.refresh(value, loaded[name])
                else:
                    value.copy_(loaded[name])


class _StepBoundary(_BackwardSyncControl):
    def no_backward_sync(self, module: Any, enabled: bool) -> contextlib.AbstractContextManager:
        # DeepSpeed's own counter would need a call of `step` after every micro-batch.
        module.set_gradient_accumulation_boundary(not enabled)
        return contextlib.nullcontext()


class LossScale(Callback):
    """Keep DeepSpeed's loss scale of float16 training in the checkpoints.

    Args:
        strategy: The strategy of the run.
    """

    _NAMES = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

    def __init__(self, strategy: ZeroStrategy) -> None:
        self._strategy = strategy

    def state_dict(self) -> dict[str, Any]:
        """Return the scale and what decides when it changes."""
        scaler = self._scaler()
        return {name: getattr(scaler, name) for name in self._NAMES}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state that `state_dict` returned."""
        vars(self._scaler()).update(state)

    def _scaler(self) -> Any:
        optimizer: Any = self._strategy.model.optimizer
        return optimizer.loss_scaler
