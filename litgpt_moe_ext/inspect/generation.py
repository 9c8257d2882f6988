"""Measures how fast models read a prompt and write tokens: models take turns in one process, medians over rounds.

Shape legend: B sequences, T tokens of the prompt.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, cast

import torch
from litgpt import GPT
from torch import Tensor

from litgpt_moe_ext.config.features import MOE_CLASS_NAMES
from litgpt_moe_ext.evaluation.decoding import decode, kv_cache
from litgpt_moe_ext.evaluation.sampling import GREEDY
from litgpt_moe_ext.export.llama_moe import obstacles, to_llama_moe
from litgpt_moe_ext.study.twin import without_experts

if TYPE_CHECKING:
    from litgpt_moe_ext.config.types import Config


@dataclass(frozen=True)
class Workload:
    """The work of every contender in a round.

    Attributes:
        batch_sizes: Numbers of sequences generated at once, one measurement for each.
        prompt_length: Tokens of the prompt.
        new_tokens: Tokens to write.
        rounds: Measured rounds, after one warm-up round.
    """

    batch_sizes: tuple[int, ...]
    prompt_length: int
    new_tokens: int
    rounds: int


@dataclass(frozen=True)
class Timing:
    """Medians of one contender at one batch size.

    Attributes:
        model: Name of the contender.
        batch_size: Sequences at once.
        time_to_first_token: Seconds from the prompt to its first new token.
        prefill: Prompt tokens per second, of all sequences together.
        decode: New tokens per second after the first, of all sequences together.
        weights: Bytes of parameters and buffers.
        kv_cache: Bytes of the cache.
    """

    model: str
    batch_size: int
    time_to_first_token: float
    prefill: float
    decode: float
    weights: int
    kv_cache: int


def contenders(model: GPT) -> tuple[dict[str, GPT], list[str]]:
    """Return models to compare, and the reasons for a missing one.

    Args:
        model: A `litgpt.GPT`, in evaluation mode, with its weights.

    Returns:
        By name: the model itself, a dense model of the same active width with random weights, and LitGPT's `LLaMAMoE`
        with the same weights if it can express the model; and reasons if it cannot.
    """
    config, device, dtype = model.config, model.lm_head.weight.device, model.lm_head.weight.dtype
    made: dict[str, GPT] = {config.mlp_class_name: model}
    reasons: list[str] = []
    if config.mlp_class_name in MOE_CLASS_NAMES:
        if reasons := obstacles(config, model.state_dict()):
            reasons = [f"no LLaMAMoE: {reason}" for reason in reasons]
        else:
            made["LLaMAMoE"] = _build(*to_llama_moe(config, model.state_dict()), device, dtype)
    if config.n_expert:
        made["dense twin"] = initialized(as_dense(cast("Config", config))).to(device=device, dtype=dtype).eval()
    return made, reasons


def as_dense(config: "Config") -> "Config":
    """Return the configuration of a dense model with feed-forward layers as wide as a token's experts together."""
    width = config.moe_intermediate_size or config.intermediate_size or 0
    shared = config.shared_expert_intermediate_size or width * (config.n_shared_expert or 0)
    return type(config)(
        **without_experts(asdict(config)) | {"intermediate_size": config.n_expert_per_token * width + shared}
    )


def initialized(config: "Config") -> GPT:
    """Return a `litgpt.GPT` on the CPU with the initial weights of `litgpt pretrain`."""
    from lightning import Fabric
    from litgpt.pretrain import initialize_weights

    fabric = Fabric(accelerator="cpu", devices=1)
    with fabric.init_module(empty_init=True):
        model = GPT(config)
    initialize_weights(fabric, model, n_layer=config.n_layer, n_embd=config.n_embd)
    return model.requires_grad_(False).eval()


@torch.inference_mode()
def benchmark(models: Mapping[str, GPT], workload: Workload, advance: Callable[[int], None]) -> list[Timing]:
    """Measure every model at every batch size, round by round, one after the other.

    Args:
        models: `litgpt.GPT` models by name.
        workload: The work of a round.
        advance: Called with 1 after each of the models x batch sizes x (rounds + 1) generations.
    """
    timings = []
    for batch_size in workload.batch_sizes:
        measured: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
        cache: dict[str, int] = {}
        for turn in range(workload.rounds + 1):
            for name, model in models.items():
                seconds, cache[name] = _generate(model, batch_size, workload)
                if turn:
                    measured[name].append(seconds)
                advance(1)
        for name, model in models.items():
            first, rest = (statistics.median(column) for column in zip(*measured[name], strict=True))
            timings.append(
                Timing(
                    model=name,
                    batch_size=batch_size,
                    time_to_first_token=first,
                    prefill=batch_size * workload.prompt_length / first,
                    decode=batch_size * (workload.new_tokens - 1) / rest,
                    weights=sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
                    kv_cache=cache[name],
                )
            )
    return timings


def _generate(model: GPT, batch_size: int, workload: Workload) -> tuple[tuple[float, float], int]:
    """Return the seconds to the first token and for the others, and the bytes of the cache."""
    device, length = model.lm_head.weight.device, workload.prompt_length
    prompt_BT = torch.randint(0, model.config.vocab_size, (batch_size, length), device=device)
    with kv_cache(model, batch_size, length + workload.new_tokens):
        cache = sum(buffer.nbytes for name, buffer in model.named_buffers() if ".kv_cache." in name)
        tokens = decode(model, prompt_BT, workload.new_tokens, GREEDY)
        start = _now(device)
        next(tokens)
        first = _now(device)
        for _ in tokens:
            pass
        return (first - start, _now(device) - first), cache


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _build(config: "Config", state: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> GPT:
    model = GPT(config)
    model.load_state_dict(state)
    return model.to(device=device, dtype=dtype).requires_grad_(False).eval()
