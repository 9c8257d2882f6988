"""Fabric's DeepSpeed strategy, for a loop that sets up the model first and the optimizer after it."""

import contextlib
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.strategies import DeepSpeedStrategy, Strategy
from lightning.fabric.strategies.strategy import _BackwardSyncControl
from litgpt.args import TrainArgs
from torch import Tensor, nn

from litgpt_moe_ext.training.callback import Callback
from litgpt_moe_ext.training.parallel.deepspeed.optimizer import ZeroOptimizer
from litgpt_moe_ext.training.parallel.deepspeed.settings import engine_options, step_options
from litgpt_moe_ext.training.settings import DistributedArgs

_WORKING_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "32-true": torch.float32}


class ZeroStrategy(DeepSpeedStrategy):
    """DeepSpeed's ZeRO behind the calls of LitGPT's loop.

    DeepSpeed wants model and optimizer at once, with the number of micro batches and the largest gradient norm in its
    configuration. Call `follow` before the model is set up and `start` when the optimizer is made; `setup_module` only
    prepares the model.

    Checkpoints hold whole tensors, as those of ddp do.

    Args:
        stage: 1 to 3.
        args: The knobs.
    """

    def __init__(self, stage: int, args: DistributedArgs) -> None:
        super().__init__(**engine_options(stage, args), timeout=timedelta(minutes=args.timeout_minutes))
        self._backward_sync_control = _StepBoundary()
        self._optimizer: ZeroOptimizer | None = None

    def follow(self, train: TrainArgs) -> None:
        """Have DeepSpeed accumulate and clip as LitGPT's loop means it; processes must be connected already."""
        accumulation = train.gradient_accumulation_iters(self.world_size)
        self.config.update(step_options(train.micro_batch_size, accumulation, train.max_norm, self.precision.precision))

    def setup_module(self, module: nn.Module) -> nn.Module:
        # What DeepSpeed will do as well. Done here, callbacks see the model as it will train. Buffers keep their dtype.
        for parameter in module.parameters():
            parameter.data = parameter.data.to(_WORKING_DTYPES[self.precision.precision])
        return module

    def start(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, on_norm: Callable[[Tensor], None]
    ) -> tuple[nn.Module, ZeroOptimizer]:
        """Hand model and optimizer over to DeepSpeed.

        Args:
            module: The model, as `setup_module` returned it.
            optimizer: Over its parameters.
            on_norm: As `ZeroOptimizer`.

        Returns:
            What to call instead of the model, and what to use as the optimizer.
        """
        members = [list(group["params"]) for group in optimizer.param_groups]
        engine, _, _ = self.setup_module_and_optimizers(module, [optimizer])
        self._optimizer = ZeroOptimizer(engine, members, on_norm)
        return engine, self._optimizer

    def backward(self, tensor: Tensor, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        # The loop has divided the loss by the number of micro batches already.
        module.backward(tensor, *args, scale_wrt_gas=False, **kwargs)

    def save_checkpoint(self, path: str | Path, state: dict, storage_options: Any = None, filter: Any = None) -> None:
        Strategy.save_checkpoint(self, path, state, storage_options, filter)

    def load_checkpoint(
        self, path: str | Path, state: dict | None = None, strict: bool = True, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, path, state, strict, weights_only)

    def get_module_state_dict(self, module: nn.Module) -> dict[str, Tensor]:
        """Return whole float32 weights and the buffers, on the CPU of the first process; every process must call."""
        whole: dict[int, Tensor] = {}
        result = {}
        for name, value in module.module.state_dict(keep_vars=True).items():
            if id(value) not in whole:  # tied weights are one tensor under two names
                tensor = self._optimizer.shards.gather(value) if isinstance(value, nn.Parameter) else value.detach()
                whole[id(value)] = tensor.to("cpu", copy=True) if self.is_global_zero else tensor.new_empty(0)
            result[name] = whole[id(value)]
        return result

    def load_module_state_dict(self, module: nn.Module, state_dict: dict[str, Tensor], strict: bool = True) -> None:
        """Give the model other weights, whole ones, that every process has; every process must call."""
        network = module.module
        # Under stage 3 no process has room for a model to load into, and a module may want to convert what it loads.
        with torch.device("meta"):
            reader = type(network)(network.config)
        reader.load_state_dict(state_dict, strict=strict, assign=True)
        loaded = reader.state_dict()
        shards = self._optimizer.shards
        with torch.no_grad():
            for name, value in network.state_dict(keep_vars=True).items():
                if isinstance(value, nn.Parameter):
                    shards.scatter(value, loaded[name])
                    shards.refresh(value, loaded[name])
                else:
                    value.copy_(loaded[name])


class _StepBoundary(_BackwardSyncControl):
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> contextlib.AbstractContextManager:
        # DeepSpeed's own counter would need a call of `step` after every micro batch.
        module.set_gradient_accumulation_boundary(not enabled)
        return contextlib.nullcontext()


class LossScale(Callback):
    """Keeps DeepSpeed's loss scale of float16 training in the checkpoints.

    Args:
        strategy: The strategy of the run.
    """

    _NAMES = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

    def __init__(self, strategy: ZeroStrategy) -> None:
        self._strategy = strategy

    def state_dict(self) -> dict[str, Any]:
        """Return the scale and what decides when it changes."""
        scaler = self._strategy.model.optimizer.loss_scaler
        return {name: getattr(scaler, name) for name in self._NAMES}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state that `state_dict` returned."""
        vars(self._strategy.model.optimizer.loss_scaler).update(state)
