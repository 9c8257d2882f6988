"""A recipe or a checkpoint directory as the settings that analysis needs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Recipe:
    """What is known about a model and its training before anything runs.

    Attributes:
        config: The `litgpt.Config`.
        settings: The recipe's other settings as plain data; empty for a checkpoint without hyperparameters.
    """

    config: Any
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def train(self) -> dict[str, Any]:
        return self.settings.get("train") or {}

    @property
    def sequence_length(self) -> int:
        return self.train.get("max_seq_length") or self.config.block_size

    @property
    def micro_batch_size(self) -> int:
        return self.train.get("micro_batch_size") or 4  # LitGPT's default

    @property
    def tie_embeddings(self) -> bool:
        return bool(self.train.get("tie_embeddings"))

    @property
    def optimizer(self) -> str | dict:
        return self.settings.get("optimizer") or "AdamW"

    @property
    def strategy(self) -> str:
        return self.settings.get("strategy") or "auto"

    @property
    def devices(self) -> int | None:
        """Processes on each node; `None` for as many as there are GPUs."""
        devices = self.settings.get("devices")
        return int(devices) if devices not in (None, "auto", "-1", -1) else None

    @property
    def num_nodes(self) -> int:
        return self.settings.get("num_nodes") or 1

    @property
    def precision(self) -> str | None:
        return self.settings.get("precision")

    @property
    def memory_savers(self) -> dict[str, Any]:
        """Arguments of `training_memory`."""
        return {
            "activation_checkpointing": self.settings.get("activation_checkpointing") or "none",
            "fused_cross_entropy": bool(self.settings.get("fused_cross_entropy")),
        }


def load_recipe(path: Path) -> Recipe:
    """Read a recipe (a YAML file with `model_config` or `model_name`) or a checkpoint directory.

    Raises:
        FileNotFoundError: If there is no such file, or the directory has no `model_config.yaml`.
        ValueError: If the file does not describe a model.
    """
    from litgpt import Config

    if path.is_dir():
        if not (path / "model_config.yaml").is_file():
            raise FileNotFoundError(f"{str(path)!r} has no model_config.yaml; name a checkpoint directory or a recipe")
        hyperparameters = path / "hyperparameters.yaml"
        settings = read_yaml(hyperparameters) if hyperparameters.is_file() else {}
        return Recipe(Config.from_file(path / "model_config.yaml"), settings)
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} does not exist; name a recipe (YAML file) or a checkpoint directory")
    settings = read_yaml(path)
    try:
        if settings.get("model_config"):
            return Recipe(Config(**settings["model_config"]), settings)
        if settings.get("model_name"):
            return Recipe(Config.from_name(settings["model_name"]), settings)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"{str(path)!r} has a model_config that cannot be built: {error}") from error
    raise ValueError(f"{str(path)!r} has neither model_config nor model_name; name a recipe such as those in configs/")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file whose content is a mapping.

    Raises:
        ValueError: If it is something else.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} holds {type(content).__name__} instead of settings")
    return content
