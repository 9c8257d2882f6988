"""Our layer of experts with each of its backends, and those to compare it with."""

import contextlib
import dataclasses
import importlib.util
from typing import Any

import torch
from litgpt import Config
from litgpt.model import LLaMAMLP, LLaMAMoE
from torch import Tensor, nn

from gpu_tables.measuring.bench import Bench
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.moe.layer import SharedExpertMoE

BACKENDS = ("triton", "grouped_mm", "loop")


@dataclasses.dataclass(frozen=True)
class Size:
    """An MoE layer: its width, the hidden width of an expert, the experts, and how many of them a token has."""

    name: str
    D: int
    F: int
    E: int
    K: int

    @property
    def title(self) -> str:
        return f"{self.name}: D{self.D} F{self.F} E{self.E} k{self.K}"

    def config(self, mlp_class_name: str, **changes: Any) -> Config:
        sizes = {"n_embd": self.D, "n_expert": self.E, "n_expert_per_token": self.K, "moe_intermediate_size": self.F}
        fixed = {"n_layer": 1, "n_head": 4, "bias": False, "intermediate_size": self.K * self.F}
        return Config(**sizes, **fixed, mlp_class_name=mlp_class_name, **changes)


SIZES = (
    Size("60M", 512, 768, 4, 2),
    Size("200M", 768, 2048, 8, 2),
    Size("TinyStories", 256, 1024, 8, 2),
    Size("fine-grained", 512, 256, 64, 8),
)


def sizes(tiny: bool) -> tuple[Size, ...]:
    return (Size("tiny", 64, 32, 4, 2),) if tiny else SIZES


def make_layers(size: Size, bench: Bench) -> dict[str, nn.Module]:
    """Return our layer with every backend that works here, and those to compare it with."""
    layers: dict[str, nn.Module] = {}
    for backend in BACKENDS:
        with contextlib.suppress(SettingsError):
            layers[backend] = make_layer(size, bench, backend)
    layers["LLaMAMoE"] = LLaMAMoE(size.config("LLaMAMoE"))
    with contextlib.suppress(ImportError):
        layers["HF"] = _hugging_face_layer(size)
    if importlib.util.find_spec("liger_kernel") is not None:
        layers["Liger"] = _Liger(layers[next(iter(layers))])
    layers["dense"] = LLaMAMLP(size.config("LLaMAMLP"), size.K * size.F)
    return {name: layer.to(bench.device, bench.dtype) for name, layer in layers.items()}


def make_layer(size: Size, bench: Bench, backend: str) -> nn.Module:
    """Return our layer with a backend; raises SettingsError where it does not work."""
    moe = SharedExpertMoE(size.config("SharedExpertMoE", expert_backend=backend))
    moe.experts.backend_for(torch.empty(1, size.D, device=bench.device, dtype=bench.dtype))
    moe.gate.reset_parameters()
    moe.experts.reset_parameters()
    return moe.to(bench.device, bench.dtype)


def make_router(D: int, E: int, **settings: Any) -> nn.Module:
    """Return the router of a layer whose width and default of two chosen experts do not matter."""
    gate = SharedExpertMoE(Size("", D, 32, E, 2).config("SharedExpertMoE", **settings)).gate
    gate.reset_parameters()
    return gate


def _hugging_face_layer(size: Size) -> nn.Module:
    """Return Mixtral's layer; from transformers 5 on with the experts in grouped products, as its models have them."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    names = {"num_local_experts": size.E, "num_experts_per_tok": size.K}
    config = MixtralConfig(hidden_size=size.D, intermediate_size=size.F, **names)
    config._experts_implementation = "grouped_mm"
    layer = MixtralSparseMoeBlock(config)
    # A layer without its model is not initialized, and would route by garbage in its memory.
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    return layer


class _Liger(nn.Module):
    """Liger's fused experts behind our router."""

    def __init__(self, moe: SharedExpertMoE) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x_BTD: Tensor) -> Tensor:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

        x_TD = x_BTD.flatten(0, 1)
        routing, weights = self.moe.gate(x_TD), self.moe.experts.weights
        chosen = (routing.experts_TK, routing.weights_TK.to(x_TD.dtype))
        arguments = (x_TD, weights.up_EGD, weights.down_EDF, *chosen)
        return LigerFusedMoEFunction.apply(*arguments).view(x_BTD.shape)


def forward_backward(layer: nn.Module, x: Tensor) -> None:
    layer.zero_grad()
    x.grad = None
    y = layer(x)
    y = y[0] if isinstance(y, tuple) else y
    y.backward(x.detach())
