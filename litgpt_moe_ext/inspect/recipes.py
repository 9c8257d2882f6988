"""The settings of a recipe or a checkpoint directory, for judging them before anything runs."""

import dataclasses
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast

from litgpt_moe_ext.config.litgpt_fields import check_names, check_ranges
from litgpt_moe_ext.errors import (
    SettingsError,
    did_you_mean_recipe,
    one_line,
    which_checkpoint,
)
from litgpt_moe_ext.field_types import checked
from litgpt_moe_ext.recipe_files import as_data, read_recipe
from litgpt_moe_ext.training.settings import Section, Settings, TrainArgs

if TYPE_CHECKING:
    from litgpt_moe_ext.config.types import Config
    from litgpt_moe_ext.inspect.cost.memory import Step


# Settings and whole sections that this module and the doctor read. LitGPT's other commands allow more precisions.
_READ = (
    *("train", "eval", "ema", "distributed", "optimizer", "strategy", "devices", "num_nodes", "precision", "compile"),
    *("cuda_graphs", "activation_checkpointing", "fused_cross_entropy", "tokenizer_dir", "out_dir"),
)
_TYPES_ELSEWHERE: dict[str, Any] = {"precision": str}


class MemorySavers(TypedDict):
    """Settings that trade time for memory, by their names in a recipe."""

    activation_checkpointing: Literal["none", "full", "selective"]
    fused_cross_entropy: bool


@dataclass(frozen=True)
class Recipe:
    """What is known about a model and its training before anything runs.

    Attributes:
        config: The model's configuration.
        settings: The other settings of the recipe as plain data; empty for a checkpoint without hyperparameters.
        checkpoint: The checkpoint directory of these settings, whose classes are not imported; None for a recipe.
    """

    config: "Config"
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    checkpoint: Path | None = None

    @property
    def train(self) -> dict[str, Any]:
        """The section `train`."""
        return self.settings.get("train") or {}

    @property
    def sequence_length(self) -> int:
        """Tokens of a training sequence."""
        return self.train.get("max_seq_length") or self.config.block_size

    @property
    def micro_batch_size(self) -> int:
        """Sequences per forward pass."""
        return self.train.get("micro_batch_size") or TrainArgs.micro_batch_size

    @property
    def global_batch_size(self) -> int:
        """Sequences per optimizer step."""
        return self.train.get("global_batch_size") or TrainArgs.global_batch_size

    @property
    def tie_embeddings(self) -> bool:
        """Whether token embedding and output head share one table."""
        return bool(self.train.get("tie_embeddings"))

    @property
    def averages(self) -> bool:
        """Whether the run keeps a moving average of the weights."""
        return (self.settings.get("ema") or {}).get("decay") is not None

    @property
    def optimizer(self) -> str | dict[str, Any]:
        """Name of the optimizer, or its `class_path` and `init_args`."""
        return self.settings.get("optimizer") or Settings.optimizer

    @property
    def strategy(self) -> str:
        """Name of the strategy."""
        return self.settings.get("strategy") or Settings.strategy

    @property
    def devices(self) -> int | None:
        """Processes on each node; None for as many as there are GPUs."""
        devices = self.settings.get("devices")
        return int(devices) if devices not in (None, "auto", "-1", -1) else None

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return self.settings.get("num_nodes") or Settings.num_nodes

    @property
    def precision(self) -> str | None:
        """Precision setting; None leaves the choice to the device."""
        return self.settings.get("precision")

    @property
    def memory_savers(self) -> MemorySavers:
        """Settings that trade time for memory."""
        return {
            "activation_checkpointing": (
                self.settings.get("activation_checkpointing") or Settings.activation_checkpointing
            ),
            "fused_cross_entropy": bool(self.settings.get("fused_cross_entropy")),
        }

    def step(self, precision: str) -> "Step":
        """Return a training step of this recipe in a precision."""
        from litgpt_moe_ext.inspect.cost.memory import Step

        return Step(
            precision=precision,
            micro_batch_size=self.micro_batch_size,
            sequence_length=self.sequence_length,
            optimizer=self.optimizer,
            tie_embeddings=self.tie_embeddings,
            averages=self.averages,
            **self.memory_savers,
        )


def load_recipe(path: Path) -> Recipe:
    """Read a recipe (a YAML file with `model_config` or `model_name`) or a checkpoint directory.

    Raises:
        SettingsError: If there is no such file, or it does not describe a model.
    """
    return _of_checkpoint(path) if path.is_dir() else _of_file(path)


def _of_checkpoint(path: Path) -> Recipe:
    from litgpt_moe_ext.host.checkpoints import CONFIG_FILE, read_config

    if not (path / CONFIG_FILE).is_file():
        hint = which_checkpoint(path, CONFIG_FILE)
        raise SettingsError(f"recipe: {str(path)!r} must have a {CONFIG_FILE}{hint}")
    hyperparameters = path / "hyperparameters.yaml"
    settings = read_recipe(hyperparameters, "recipe")[0] if hyperparameters.is_file() else {}
    settings = as_data(settings, hyperparameters)
    try:
        _check_types({name: settings.get(name) for name in _READ}, Settings)
    except SettingsError as error:
        raise SettingsError(f"{error} ({hyperparameters})") from None
    return Recipe(read_config(path, "recipe"), settings, checkpoint=path)


def _of_file(path: Path) -> Recipe:
    from litgpt import Config as LitGPTConfig

    if not path.is_file():
        hint = did_you_mean_recipe(path) or "; `litgpt-moe init` lists recipes and writes one"
        raise SettingsError(f"recipe: {str(path)!r} must be a recipe (YAML file) or a checkpoint directory{hint}")
    settings, _ = read_recipe(path, "recipe")
    model = settings.get("model_config") or {}
    if not isinstance(model, dict):
        raise SettingsError(f"model_config: {model!r} must be settings, NAME: VALUE ({path})")
    check_names(model, str(path))
    try:
        if model:
            check_ranges(model)
            return Recipe(cast("Config", LitGPTConfig(**model)), settings)
        if settings.get("model_name"):
            return Recipe(cast("Config", LitGPTConfig.from_name(settings["model_name"])), settings)
    except (TypeError, ValueError, AssertionError) as error:  # raised by LitGPT and this plugin for wrong fields
        raise SettingsError(f"recipe: {str(path)!r} must have a valid model_config: {one_line(error)}") from error
    raise SettingsError(f"recipe: {str(path)!r} must have model_config or model_name, like those in configs/")


def _check_types(settings: dict[str, Any], section: Any) -> None:
    # Nulls and unknown settings are skipped, as another program may have written them.
    for setting in dataclasses.fields(section):
        value, kind, name = settings.get(setting.name), setting.type, section.name_of(setting.name)
        if value is None:
            continue
        if inspect.isclass(kind) and issubclass(kind, Section):
            _check_types(checked(name, value, dict), kind)
        else:
            checked(name, value, _TYPES_ELSEWHERE.get(name, kind))
