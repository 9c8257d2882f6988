"""The checkpoint that is exported: its configuration and weights, and what follows from both."""

import functools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from litgpt_moe_ext.errors import SettingsError, which_checkpoint
from litgpt_moe_ext.evaluation.loading import VOCABULARY_FILES, load_tokenizer, read_checkpoint
from litgpt_moe_ext.export.tensors import BALANCING_BIAS
from litgpt_moe_ext.files.archives import open_archive
from litgpt_moe_ext.host.checkpoints import CONFIG_FILE, WEIGHTS_FILE, read_config
from litgpt_moe_ext.meta.models import meta_model
from litgpt_moe_ext.moe.expert_layouts import stack_experts
from litgpt_moe_ext.training.checkpoint.progress import AVERAGE, checkpoint_around
from litgpt_moe_ext.wording import quoted

if TYPE_CHECKING:
    from litgpt import Tokenizer

    from litgpt_moe_ext.config.types import Config
    from litgpt_moe_ext.export.architecture import Architecture

# Only training uses these; the exported model computes the same without them.
TRAINING_ONLY = ("gate.noise_weight", "gate.bias_updates")
_HEAD, _EMBEDDINGS = "lm_head.weight", "transformer.wte.weight"
_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Source:
    """A checkpoint.

    Attributes:
        directory: Its directory.
        config: Its model configuration.
        state: Its weights by name, which stay on the disk until they are used.
        run: Other state of the run that saved it: the position in the data, callbacks.
    """

    directory: Path
    config: "Config"
    state: dict[str, Tensor]
    run: dict[str, Any] = field(default_factory=dict)

    @property
    def checkpoint(self) -> Path:
        """The checkpoint of the run that it belongs to, which is another directory for a moving average."""
        return checkpoint_around(self.directory)

    @property
    def dtype(self) -> torch.dtype:
        """The floating type of most weights."""
        return self.state[_HEAD].dtype

    @functools.cached_property
    def tied(self) -> bool:
        """True if output head and token embeddings are equal, as after `train.tie_embeddings`."""
        return torch.equal(self.state[_HEAD], self.state[_EMBEDDINGS])

    def with_own_experts(self) -> "Source":
        """Return the same model with this package's experts, which exports know, in place of LitGPT's `LLaMAMoE`."""
        config, state = with_own_experts(self.config), self.state
        if config is not self.config:
            gates = [name.removesuffix("weight") for name in state if name.endswith(".mlp.gate.weight")]
            state = {f"{gate}{BALANCING_BIAS}": torch.zeros(config.n_expert) for gate in gates} | state
        return replace(self, config=config, state=state)

    def writes_once(self, architecture: "Architecture") -> bool:
        """Return whether output head and token embeddings are one table in a class."""
        return architecture.ties and self.tied

    def nbytes(self, dtype: torch.dtype | None, architecture: "Architecture | None" = None) -> int:
        """Return about how many bytes the weights take, in their own or another type, in a class or all of them."""
        stored = self._stored(architecture) if architecture else self.state
        return sum(tensor.numel() * (dtype or tensor.dtype).itemsize for tensor in stored.values())

    def tensors(self, architecture: "Architecture", meta: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yield the names and tensors of a class, one at a time.

        Args:
            architecture: The class.
            meta: Whether only shapes and types are needed.
        """
        for name, stored in architecture.rules(self.config, self._stored(architecture)).items():
            tensor = self.state[name]
            if meta:
                tensor = tensor.to("meta")
            elif name.endswith(BALANCING_BIAS) and self.config.n_expert_groups:
                tensor = without_negatives(tensor)
            yield from stored.out(tensor)
        yield from architecture.constants(self.config, self.state).items()

    def _stored(self, architecture: "Architecture") -> dict[str, Tensor]:
        left_out = {_HEAD} if self.writes_once(architecture) else set()
        return {name: tensor for name, tensor in self.state.items() if name not in left_out}


def with_own_experts(config: "Config") -> "Config":
    """Return the configuration of the MoE of this package that computes what a `LLaMAMoE` does; any other as it is."""
    if config.mlp_class_name != "LLaMAMoE":
        return config
    same: dict[str, Any] = {"mlp_class_name": "MoE", "mlp_activation": "swiglu", "router_type": "topk"}
    if config.n_expert_groups:
        same["router_score_function"] = "sigmoid"
    else:
        same |= {"router_score_function": "softmax", "norm_topk_prob": True}
    return replace(config, **same)


def without_negatives(bias_E: Tensor) -> Tensor:
    """Return a balancing bias that makes the same choices and has no entry below 0.

    transformers 4 and LitGPT's `LLaMAMoE` mask the groups that were not chosen with 0, which would win against negative
    biased scores. Adding the same number to all biases changes no choice.

    Args:
        bias_E: The bias, one entry for each expert.
    """
    return bias_E - bias_E.min().clamp(max=0)


def read_source(checkpoint_dir: Path, setting: str = "checkpoint_dir") -> Source:
    """Open a checkpoint of any strategy; a training checkpoint's optimizer is left out.

    Args:
        checkpoint_dir: Its directory.
        setting: Which setting named it, for errors.

    Raises:
        SettingsError: If it is not whole, is damaged, was written by a newer version, or has other weights than its
            configuration says.
    """
    folder = checkpoint_dir.resolve()
    if (folder.parent if folder.name == AVERAGE else folder).name.startswith("."):
        # The name of a checkpoint that a run has not finished writing, or is about to delete.
        raise SettingsError(f"{setting}: {quoted(checkpoint_dir)} is being written; name a finished checkpoint")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not os.path.isfile(checkpoint_dir / name):  # `Path.is_file` raises without permission
            hint = which_checkpoint(checkpoint_dir, WEIGHTS_FILE)
            raise SettingsError(f"{setting}: {quoted(checkpoint_dir)} has no {name}{hint}")
    config = read_config(checkpoint_dir, setting)
    content = read_checkpoint(checkpoint_dir / WEIGHTS_FILE, setting)
    run = _state_of_run(checkpoint_dir, content)
    state = content.get("model", content)
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise SettingsError(f"{setting}: {checkpoint_dir / WEIGHTS_FILE} must hold weights by name; name a checkpoint")
    state = _weights(state)
    if different := _difference(state, _weights(meta_model(config).state_dict())):
        raise SettingsError(
            f"{setting}: its weights are not those of its {CONFIG_FILE}: {different}; name a whole checkpoint"
        )
    return Source(checkpoint_dir, config, state, run)


def _state_of_run(checkpoint_dir: Path, content: dict[str, Any]) -> dict[str, Any]:
    if (around := checkpoint_around(checkpoint_dir)) != checkpoint_dir:
        try:
            content = open_archive(around / WEIGHTS_FILE, "checkpoint_dir")
        except SettingsError:  # the average is whole without it
            return {}
    return {key: content[key] for key in ("train_dataloader", "callbacks") if "model" in content and key in content}


def _weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    kept = {name: tensor for name, tensor in state.items() if not name.endswith(TRAINING_ONLY)}
    prefixes = {name[: name.index(".experts.") + 9] for name in kept if ".experts.0." in name}
    for prefix in prefixes:
        count = len({name[len(prefix) :].split(".")[0] for name in kept if name.startswith(prefix)})
        stack_experts(kept, prefix, count)
    return kept


def _difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """Return in words how weights differ from those of a model, on the meta device; empty if they do not."""
    if found.keys() != expected.keys():
        missing, surplus = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        return f"missing {missing[:5]}, surplus {surplus[:5]}"
    for name, tensor in found.items():
        shape, wanted = tuple(tensor.shape), tuple(expected[name].shape)
        if shape != wanted:
            return f"{name} is {shape} instead of {wanted}"
        if expected[name].is_floating_point() and tensor.dtype not in _FLOATING:
            return f"{name} is {str(tensor.dtype).removeprefix('torch.')} instead of floating-point numbers"
    return ""


def read_tokenizer(checkpoint_dir: Path, vocab_size: int) -> "Tokenizer | None":
    """Open the tokenizer of a checkpoint, if there is one.

    Args:
        checkpoint_dir: Its directory.
        vocab_size: Rows of the model's embedding table.

    Raises:
        SettingsError: If it cannot be opened, or has ids that the model has no embedding for.
    """
    from litgpt_moe_ext.data.tokenizer.opening import vocabulary_size_of

    if not any((checkpoint_dir / name).is_file() for name in VOCABULARY_FILES):
        return None
    tokenizer = load_tokenizer(checkpoint_dir)
    size = vocabulary_size_of(tokenizer)
    if size > vocab_size:
        raise SettingsError(
            f"checkpoint_dir: the tokenizer in {quoted(checkpoint_dir)} has ids up to {size - 1}, but the model only "
            f"{vocab_size} embeddings; copy the tokenizer that it was trained with there"
        )
    return tokenizer


def ends_of_texts(checkpoint_dir: Path, tokenizer: "Tokenizer", vocab_size: int) -> list[int]:
    """Return the ids of all tokens that end a text, the tokenizer's own first; empty if there is none.

    Chat models have several, which only a `generation_config.json` lists.

    Args:
        checkpoint_dir: The directory of the tokenizer.
        tokenizer: The tokenizer.
        vocab_size: Rows of the model's embedding table.
    """
    if tokenizer.eos_id is None:
        return []
    try:
        said = json.loads((checkpoint_dir / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    except (OSError, ValueError, KeyError, TypeError):  # missing, or malformed in a way that LitGPT repairs
        said = None
    others = [i for i in said if type(i) is int and 0 <= i < vocab_size] if isinstance(said, list) else []
    return list(dict.fromkeys([tokenizer.eos_id, *others]))
