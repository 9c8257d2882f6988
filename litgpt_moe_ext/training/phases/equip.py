"""The fifth phase of a run: the callbacks that its settings ask for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from litgpt_moe_ext.kernels.precision import float32_precision
from litgpt_moe_ext.training.callbacks.activation_checkpointing import ActivationCheckpointing
from litgpt_moe_ext.training.callbacks.anomalies import GradientGuard
from litgpt_moe_ext.training.callbacks.ema import WeightAverage
from litgpt_moe_ext.training.callbacks.expert_images import ExpertImages, shows_pictures
from litgpt_moe_ext.training.callbacks.fused_loss import FusedLoss, require_torch
from litgpt_moe_ext.training.callbacks.kernel_report import KernelReport
from litgpt_moe_ext.training.callbacks.step_metrics import StepMetrics
from litgpt_moe_ext.training.callbacks.telemetry import Telemetry
from litgpt_moe_ext.training.compilation import CompileDecision, decide
from litgpt_moe_ext.training.gpu_peaks import peak_flops
from litgpt_moe_ext.training.phases.checks import check_whole_model
from litgpt_moe_ext.training.steps.graphs.decision import GraphDecision
from litgpt_moe_ext.training.steps.graphs.decision import decide as decide_graphs

if TYPE_CHECKING:
    from litgpt_moe_ext.training.callback import Callback
    from litgpt_moe_ext.training.phases.launch import Launched
    from litgpt_moe_ext.training.phases.prepare import Prepared


@dataclass(frozen=True)
class Equipment:
    """The parts of a run that act on the loop other than as callbacks.

    Attributes:
        compile: Whether the model is compiled, and why.
        graphs: Whether CUDA graphs are tried, and why not.
        fused_loss: Computes output head and loss together, or None if the head is computed by itself.
    """

    compile: CompileDecision
    graphs: GraphDecision
    fused_loss: FusedLoss | None


def choose_equipment(launched: Launched) -> Equipment:
    """Choose the equipment, before data are prepared, which may take hours.

    Raises:
        SettingsError: If the strategy cannot support a setting.
    """
    settings, fabric, strategy = launched.plan.settings, launched.fabric, launched.fabric.strategy
    compiled = _compile(launched)
    check_whole_model(settings, strategy.holds_whole_model, compiled.enabled)
    if settings.fused_cross_entropy:
        require_torch()
    return Equipment(
        compile=compiled,
        graphs=decide_graphs(
            settings.cuda_graphs,
            fabric.device.type,
            strategy.facts,
            fabric.world_size,
            compiled.enabled,
            launched.plan.config,
        ),
        fused_loss=FusedLoss() if settings.fused_cross_entropy else None,
    )


def equip(launched: Launched, prepared: Prepared, equipment: Equipment) -> None:
    """Add the callbacks to the fabric."""
    launched.fabric.strategy.follow(launched.plan.train)
    for callback in _callbacks(launched, prepared, equipment):
        launched.fabric.add_callback(callback)


def _compile(launched: Launched) -> CompileDecision:
    if (obstacle := launched.fabric.strategy.compile_obstacle) is not None:
        return CompileDecision(False, obstacle)
    return decide(launched.plan.settings.compile, launched.plan.config, launched.fabric.device.type)


def _callbacks(launched: Launched, prepared: Prepared, equipment: Equipment) -> Iterator[Callback]:
    """Yield the callbacks in the order in which they see each event."""
    plan, settings, fabric = launched.plan, launched.plan.settings, launched.fabric
    yield StepMetrics(fabric, plan.tokens_per_step // launched.accumulation)
    yield Telemetry(fabric.device, fabric.world_size, _peak(launched))
    if any(map(shows_pictures, fabric.loggers)):
        yield ExpertImages(plan.config.name, fabric)
    if settings.sample.prompts and prepared.tokenizer is not None:
        if not fabric.strategy.holds_whole_model:
            fabric.print("No samples: under this strategy no process holds a whole model.")
        else:
            from litgpt_moe_ext.training.callbacks.samples import TextSamples

            yield TextSamples(settings.sample, prepared.tokenizer)
    if settings.evaluate.wanted and prepared.tokenizer is not None and prepared.tokenizer_dir is not None:
        from litgpt_moe_ext.training.callbacks.benchmarks import make_benchmarks

        yield make_benchmarks(
            settings.evaluate, prepared.tokenizer, prepared.tokenizer_dir, plan.sequence_length, fabric
        )
    if settings.activation_checkpointing != "none":
        yield ActivationCheckpointing(settings.activation_checkpointing)
    if equipment.fused_loss is not None:
        yield equipment.fused_loss
    yield GradientGuard(settings.anomaly, plan.out_dir, fabric.global_rank, fabric.print)
    if fabric.strategy.scales_gradients:
        yield fabric.strategy.loss_scale_state()
    if settings.ema.decay is not None:
        yield WeightAverage(settings.ema)
    yield KernelReport(equipment.compile.enabled)


def _peak(launched: Launched) -> float | None:
    """Return the peak FLOP/s of a device, or None if unknown."""
    given, fabric = launched.plan.settings.peak_tflops, launched.fabric
    if given is not None:
        return 1e12 * given
    if fabric.device.type != "cuda":
        return None
    name, precision = torch.cuda.get_device_name(fabric.device), fabric.strategy.precision.precision
    peak = peak_flops(name, precision, float32_precision("cuda"))
    if peak is None:
        fabric.print(f"peak_tflops: unknown for {name} in {precision}: no utilization (mfu) is logged")
    return peak
