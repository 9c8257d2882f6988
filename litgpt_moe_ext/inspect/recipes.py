"""A recipe or a checkpoint directory as the settings that can be judged before anything runs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast

from litgpt_moe_ext.config.litgpt_fields import check_ranges
from litgpt_moe_ext.errors import (
    PERHAPS_OF_AN_EXTENSION,
    SettingsError,
    did_you_mean,
    did_you_mean_recipe,
    one_line,
    which_checkpoint,
)
from litgpt_moe_ext.recipe_files import as_data, read_recipe

if TYPE_CHECKING:
    from litgpt_moe_ext.config.types import Config
    from litgpt_moe_ext.inspect.cost.memory import Step


class MemorySavers(TypedDict):
    """Settings that trade time for memory, by their names in a recipe."""

    activation_checkpointing: Literal["none", "full", "selective"]
    fused_cross_entropy: bool


@dataclass(frozen=True)
class Recipe:
    """What is known about a model and its training before anything runs.

    Attributes:
        config: The model.
        settings: The other settings of the recipe as plain data; empty for a checkpoint without hyperparameters.
        checkpoint: The checkpoint directory that they are of, whose classes are not imported; None for a recipe.
    """

    config: "Config"
    settings: dict[str, Any] = field(default_factory=dict)
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
        """Sequences per forward pass; 4 is LitGPT's default."""
        return self.train.get("micro_batch_size") or 4

    @property
    def global_batch_size(self) -> int:
        """Sequences per optimizer step; 512 is LitGPT's default."""
        return self.train.get("global_batch_size") or 512

    @property
    def tie_embeddings(self) -> bool:
        """Whether token embedding and output head are one table."""
        return bool(self.train.get("tie_embeddings"))

    @property
    def averages(self) -> bool:
        """Whether there is a moving average of the weights."""
        return (self.settings.get("ema") or {}).get("decay") is not None

    @property
    def optimizer(self) -> str | dict[str, Any]:
        """Name of the optimizer, or its `class_path` and `init_args`."""
        return self.settings.get("optimizer") or "AdamW"

    @property
    def strategy(self) -> str:
        """Name of the strategy."""
        return self.settings.get("strategy") or "auto"

    @property
    def devices(self) -> int | None:
        """Processes on each node; None for as many as there are GPUs."""
        devices = self.settings.get("devices")
        return int(devices) if devices not in (None, "auto", "-1", -1) else None

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return self.settings.get("num_nodes") or 1

    @property
    def precision(self) -> str | None:
        """Precision setting; None leaves the choice to the device."""
        return self.settings.get("precision")

    @property
    def memory_savers(self) -> MemorySavers:
        """Settings that trade time for memory."""
        return {
            "activation_checkpointing": self.settings.get("activation_checkpointing") or "none",
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
    from litgpt import Config as LitGPTConfig

    if path.is_dir():
        file = path / "model_config.yaml"
        if not file.is_file():
            hint = which_checkpoint(path, file.name)
            raise SettingsError(f"recipe: {str(path)!r} must have a {file.name}{hint}")
        hyperparameters = path / "hyperparameters.yaml"
        settings = read_recipe(hyperparameters, "recipe")[0] if hyperparameters.is_file() else {}
        settings = as_data(settings, hyperparameters)
        model, _ = read_recipe(file, "recipe")
        _refuse_unknown(model, file, typed=False)
        try:
            check_ranges(model)
            config = cast("Config", LitGPTConfig.from_file(file))  # which knows the package's mark
        except (TypeError, ValueError, AssertionError) as error:
            raise SettingsError(f"recipe: {str(file)!r} must have a valid model_config: {one_line(error)}") from error
        return Recipe(config, settings, checkpoint=path)
    if not path.is_file():
        hint = did_you_mean_recipe(path) or "; `litgpt-moe init` lists recipes and writes one"
        raise SettingsError(f"recipe: {str(path)!r} must be a recipe (YAML file) or a checkpoint directory{hint}")
    settings, _ = read_recipe(path, "recipe")
    model = settings.get("model_config") or {}
    if not isinstance(model, dict):
        raise SettingsError(f"model_config: {model!r} must be settings, NAME: VALUE ({path})")
    _refuse_unknown(model, path, typed=True)
    try:
        if model:
            check_ranges(model)
            return Recipe(cast("Config", LitGPTConfig(**model)), settings)
        if settings.get("model_name"):
            return Recipe(cast("Config", LitGPTConfig.from_name(settings["model_name"])), settings)
    except (TypeError, ValueError, AssertionError) as error:  # how LitGPT and this plugin refuse fields of a Config
        raise SettingsError(f"recipe: {str(path)!r} must have a valid model_config: {one_line(error)}") from error
    raise SettingsError(f"recipe: {str(path)!r} must have model_config or model_name, like those in configs/")


def _refuse_unknown(model: dict[str, Any], file: Path, typed: bool) -> None:
    from litgpt import Config as LitGPTConfig

    from litgpt_moe_ext.host.checkpoints import REQUIRES_MARK

    known = LitGPTConfig.__dataclass_fields__
    for name in model:
        if name not in known and name != REQUIRES_MARK:
            # What a run has written is not misspelt.
            hint = (did_you_mean(name, known) if typed else "") or PERHAPS_OF_AN_EXTENSION
            raise SettingsError(f"model_config.{name}: no setting has this name{hint} ({file})")
