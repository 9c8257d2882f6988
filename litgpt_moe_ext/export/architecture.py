"""What a class of transformers, or a graph of llama.cpp, can express, and the choice of one for a model."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from litgpt_moe_ext.export.facts import Facts
from litgpt_moe_ext.export.tensors import LAYER, Names, Stored, rules
from litgpt_moe_ext.wording import in_shell

if TYPE_CHECKING:
    from litgpt_moe_ext.config.types import Config


@dataclass(frozen=True)
class Architecture:
    """A class of transformers, or ours.

    Attributes:
        class_name: The class with an output head.
        model_type: Its name in `config.json`.
        can: Values of each fact that it can express; facts that are not listed may have any value.
        parts: Return entries of `config.json`, or metadata of a graph; later parts replace entries of earlier ones.
        names: The map from our tensors to those of the class.
        biases: Biases of a layer that the class always has, by our names; zeros if ours has none.
        rotates_neighbours: Whether rotary positions rotate adjacent elements of a head, instead of its halves.
        more: Returns additional tensors of the class, by their names.
        ties: Whether one table may be both token embeddings and output head, also for vLLM's own class of this name.
        vllm: Values of facts with which vLLM's own class of this name computes the same; with other values only its
            Transformers backend does. Facts that are not listed may have any value.
    """

    class_name: str
    model_type: str
    can: Mapping[str, tuple[Any, ...]]
    parts: tuple[Callable[[Facts], dict[str, Any]], ...]
    names: Names
    biases: tuple[str, ...] = ()
    rotates_neighbours: bool = False
    more: Callable[["Config"], dict[str, Tensor]] = lambda config: {}
    ties: bool = True
    vllm: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the spelling of facts."""
        assert self.can.keys() | self.vllm.keys() <= {fact.name for fact in fields(Facts)}, self

    def lacks(self, facts: Facts) -> list[str]:
        """Return the facts that the class cannot express, as `fact: value`; empty if it computes this model."""
        return _differences(facts, self.can)

    def config(self, facts: Facts) -> dict[str, Any]:
        """Return the entries of `config.json`, or the metadata, for a model."""
        return {name: value for part in self.parts for name, value in part(facts).items()}

    def serve(self, facts: Facts, directory: str) -> str:
        """Return the command with which vLLM serves the export of a model."""
        options = " --trust-remote-code" if self.model_type == "litgpt_moe" else ""
        if _differences(facts, self.vllm):
            options += " --model-impl transformers"
        return f"vllm serve {in_shell(directory)}{options}"

    def rules(self, config: "Config", ours: Iterable[str]) -> dict[str, Stored]:
        """Return how the class stores the tensors of a model, by their names in `ours`."""
        return rules(self.names, ours, config, self.rotates_neighbours)

    def constants(self, config: "Config", weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors that the class has but a model with these weights lacks, by their names there."""
        found = self.more(config)
        for i in range(config.n_layer):
            for name in self.biases:
                ours = f"{LAYER}.{i}.{name}"
                if ours not in weights:
                    (theirs,) = self.rules(config, [ours])[ours].names
                    found[theirs] = torch.zeros(len(weights[ours.replace(".bias", ".weight")]))
        return found


def _differences(facts: Facts, allowed: Mapping[str, tuple[Any, ...]]) -> list[str]:
    return [
        f"{fact}: {_words(value)}" for fact, values in allowed.items() if (value := getattr(facts, fact)) not in values
    ]


def choose(facts: Facts, architectures: tuple[Architecture, ...]) -> tuple[Architecture | None, dict[str, list[str]]]:
    """Return the first class of a table that computes a model, and what each one before it lacks."""
    rejected: dict[str, list[str]] = {}
    for architecture in architectures:
        lacking = architecture.lacks(facts)
        if not lacking:
            rejected.pop(architecture.class_name, None)
            return architecture, rejected
        rejected[architecture.class_name] = lacking
    return None, rejected


def nearest(rejected: dict[str, list[str]]) -> str:
    """Return in words what the classes with the fewest missing facts lack."""
    fewest = min(len(lacking) for lacking in rejected.values())
    near = {name: lacking for name, lacking in rejected.items() if len(lacking) == fewest}
    return "; ".join(f"{name} has no {', no '.join(lacking)}" for name, lacking in near.items())


def _words(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
