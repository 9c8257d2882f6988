"""Recording which experts every token visits, in any MoE checkpoint: the plugin's layers or LitGPT's `LLaMAMoE`.

Shape legend: B sequences, T tokens, K chosen experts per token, E experts, L MoE layers, N tokens of the whole text.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from litgpt import GPT
from litgpt.model import LLaMAMoE
from torch import Tensor, nn

from litgpt_moe_ext.config.features import MOE_CLASS_NAMES
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.evaluation.batching import pad_right
from litgpt_moe_ext.evaluation.tokenization import check_ids
from litgpt_moe_ext.moe.routing.router import Router, Routing


@dataclass
class LayerRouting:
    """The decisions of one router for a text.

    Attributes:
        layer: Number of the layer among all layers of the model.
        n_expert: Number of experts E.
        weights_NK: Gate values, float32.
        experts_NK: Chosen experts, int64.
        entropy_N: Entropy of each token's scores over all experts in nats, float32; None for a router without scores.
    """

    layer: int
    n_expert: int
    weights_NK: Tensor
    experts_NK: Tensor
    entropy_N: Tensor | None


@dataclass
class _Recording:
    layer: int
    n_expert: int
    weights: list[Tensor] = field(default_factory=list)
    experts: list[Tensor] = field(default_factory=list)
    entropy: list[Tensor] = field(default_factory=list)

    def take(self) -> LayerRouting:
        entropy_N = torch.cat(self.entropy) if self.entropy else None
        return LayerRouting(self.layer, self.n_expert, torch.cat(self.weights), torch.cat(self.experts), entropy_N)


class RoutingRecorder:
    """Records the routing of the forward passes of a model between `recording` and its end.

    Args:
        model: A model in evaluation mode.

    Raises:
        SettingsError: If the model has no MoE layers.
    """

    def __init__(self, model: GPT) -> None:
        self._recordings: list[_Recording] = []
        self._keep_BT: Tensor | None = None
        self._hooks: list[tuple[nn.Module, Callable]] = []
        for layer, block in enumerate(model.get_submodule("transformer.h").children()):
            mlp = block.get_submodule("mlp")
            reader = _reader_of(mlp)
            if reader is not None:
                recording = _Recording(layer, model.config.n_expert)
                self._recordings.append(recording)
                self._hooks.append((mlp.get_submodule("gate"), self._hook(recording, reader)))
        if not self._hooks:
            raise SettingsError(
                "checkpoint_dir: its model must have MoE layers, and all are dense (mlp_class_name: "
                f"{model.config.mlp_class_name}); name one with layers of {', '.join(MOE_CLASS_NAMES)} or LLaMAMoE"
            )

    def _hook(self, recording: _Recording, reader: Callable) -> Callable:
        def hook(_gate: nn.Module, arguments: tuple, output: Any) -> None:
            routing, scores_TE = reader(output, *arguments)
            keep_T = slice(None) if self._keep_BT is None else self._keep_BT.flatten()
            recording.weights.append(routing.weights_TK[keep_T].float().cpu())
            recording.experts.append(routing.experts_TK[keep_T].cpu())
            if scores_TE is not None:
                recording.entropy.append(torch.special.entr(scores_TE[keep_T]).sum(dim=-1).float().cpu())

        return hook

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record in this scope."""
        handles = [gate.register_forward_hook(hook) for gate, hook in self._hooks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def layers(self) -> list[int]:
        """Numbers of the MoE layers among all layers of the model."""
        return [recording.layer for recording in self._recordings]

    def keep(self, keep_BT: Tensor | None) -> None:
        """Set which tokens of the following forward passes count, for example those that are not padding."""
        self._keep_BT = keep_BT

    def take(self) -> list[LayerRouting]:
        """Return the recorded routing in order of depth, and clear the record."""
        taken = [recording.take() for recording in self._recordings]
        for recording in self._recordings:
            recording.weights.clear(), recording.experts.clear(), recording.entropy.clear()
        return taken


@torch.inference_mode()
def record_routing(
    model: GPT, texts: Sequence[Sequence[int]], batch_size: int, advance: Callable[[int], None]
) -> list[LayerRouting]:
    """Run texts through a model and return the routing of all their tokens, text after text.

    A text longer than the model's block size is read in pieces of that length.

    Args:
        model: A model in evaluation mode.
        texts: Token ids.
        batch_size: Pieces per forward pass.
        advance: Called with the number of tokens done after each forward pass.

    Raises:
        SettingsError: If the model has no MoE layers, or a token is unknown to it.
    """
    check_ids(model, chain.from_iterable(texts))
    recorder = RoutingRecorder(model)
    size, device = model.max_seq_length, model.lm_head.weight.device
    pieces = [list(text[i : i + size]) for text in texts for i in range(0, len(text), size)]
    with recorder.recording():
        for i in range(0, len(pieces), batch_size):
            batch = pieces[i : i + batch_size]
            ids_BT = pad_right(batch, device)
            length_B1 = torch.tensor([[len(piece)] for piece in batch], device=device)
            recorder.keep(torch.arange(ids_BT.size(1), device=device) < length_B1)
            model(ids_BT)
            advance(sum(len(piece) for piece in batch))
    return recorder.take()


def _reader_of(mlp: nn.Module) -> Callable[..., tuple[Routing, Tensor | None]] | None:
    """Return a function from a gate's output and inputs to its layer's routing and scores; None for a dense layer."""
    gate = getattr(mlp, "gate", None)
    if isinstance(gate, Router):
        return lambda routing, x_TD, _n_sequence, _real_T, ids: (routing, gate.scores(x_TD, ids))
    if isinstance(mlp, LLaMAMoE):
        return _read_grouped(mlp) if mlp.config.n_expert_groups else _read_linear(mlp)
    return None


def _read_linear(mlp: LLaMAMoE) -> Callable:
    def read(logits_TE: Tensor, _x_TD: Tensor) -> tuple[Routing, Tensor]:
        best = logits_TE.float().topk(mlp.config.n_expert_per_token, dim=-1)
        weights_TK = best.values.softmax(dim=-1) * mlp.config.routed_scaling_factor
        return Routing(weights_TK, best.indices, best.indices), logits_TE.float().softmax(dim=-1)

    return read


def _read_grouped(mlp: LLaMAMoE) -> Callable:
    def read(output: tuple[Tensor, Tensor], x_TD: Tensor) -> tuple[Routing, Tensor]:
        weights_TK, experts_TK = output
        scores_TE = torch.nn.functional.linear(x_TD.float(), mlp.gate.get_parameter("weight").float()).sigmoid()
        scores_TE = scores_TE / scores_TE.sum(dim=-1, keepdim=True)
        return Routing(weights_TK * mlp.config.routed_scaling_factor, experts_TK, experts_TK), scores_TE

    return read
