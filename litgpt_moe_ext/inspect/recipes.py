"""The settings of a recipe or a checkpoint directory, for judging them before anything runs."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from litgpt_moe_ext.errors import SettingsError, which_checkpoint
from litgpt_moe_ext.field_types import checked
from litgpt_moe_ext.recipe_files import as_data, read_recipe
from litgpt_moe_ext.training.settings import Section, Settings
from litgpt_moe_ext.wording import quoted

if TYPE_CHECKING:
    from litgpt_moe_ext.config.types import Config
    from litgpt_moe_ext.inspect.cost.memory import Step


# What is read of a checkpoint's settings.
_READ = (
    *("train", "eval", "ema", "distributed", "optimizer", "strategy", "devices", "num_nodes", "precision", "compile"),
    *("cuda_graphs", "activation_checkpointing", "fused_cross_entropy", "tokenizer_dir", "out_dir", "data"),
)


@dataclass(frozen=True)
class Recipe:
    """What is known about a model and its training before anything runs.

    Attributes:
        config: The model's configuration.
        settings: The other settings, of which `data` is plain; the defaults for a checkpoint without hyperparameters.
        checkpoint: The checkpoint directory of these settings, whose classes are not imported; None for a recipe.
    """

    config: "Config"
    settings: Settings = dataclasses.field(default_factory=Settings)
    checkpoint: Path | None = None

    @property
    def sequence_length(self) -> int:
        """Tokens of a training sequence."""
        return self.settings.train.max_seq_length or self.config.block_size

    @property
    def devices(self) -> int | None:
        """Processes on each node; None for as many as there are GPUs."""
        return None if self.settings.devices in ("auto", -1) else int(self.settings.devices)

    @property
    def tie_embeddings(self) -> bool:
        """Whether token embedding and output head share one table."""
        return bool(self.settings.train.tie_embeddings)

    @property
    def averages(self) -> bool:
        """Whether the run keeps a moving average of the weights."""
        return self.settings.ema.decay is not None

    def step(self, precision: str) -> "Step":
        """Return a training step of this recipe in a precision.

        Raises:
            SettingsError: If its sequences are longer than the model's context.
        """
        from litgpt_moe_ext.inspect.cost.memory import Step
        from litgpt_moe_ext.training.phases.checks import check_length

        check_length(self.sequence_length, self.config.block_size)
        return Step(
            precision=precision,
            micro_batch_size=self.settings.train.micro_batch_size,
            sequence_length=self.sequence_length,
            optimizer=self.settings.optimizer,
            activation_checkpointing=self.settings.activation_checkpointing,
            fused_cross_entropy=self.settings.fused_cross_entropy,
            tie_embeddings=self.tie_embeddings,
            averages=self.averages,
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
        raise SettingsError(f"recipe: {quoted(path)} must have a {CONFIG_FILE}{hint}")
    hyperparameters = path / "hyperparameters.yaml"
    given = read_recipe(hyperparameters, "recipe")[0] if hyperparameters.is_file() else {}
    try:
        settings = known_settings(as_data(given, hyperparameters))
    except SettingsError as error:
        raise SettingsError(f"{error} ({hyperparameters})") from None
    return Recipe(read_config(path, "recipe"), settings, checkpoint=path)


def _of_file(path: Path) -> Recipe:
    from litgpt_moe_ext.cli.settings import make_config, read_plain_settings
    from litgpt_moe_ext.training.settings.model import model_of

    settings = read_plain_settings(path, make_config)
    return Recipe(cast("Config", model_of(settings)), settings)


def known_settings(given: dict[str, Any]) -> Settings:
    """Return the settings of a checkpoint, each checked by itself.

    Args:
        given: Plain data. Nulls and unknown settings are skipped, as another program may have written them.

    Raises:
        SettingsError: If a setting is of a wrong type.
    """
    settings = Settings()
    _take(settings, {name: given.get(name) for name in _READ})
    return settings


def _take(section: Section, given: dict[str, Any]) -> None:
    for field in dataclasses.fields(cast("Any", section)):
        value, own, name = given.get(field.name), getattr(section, field.name), section.name_of(field.name)
        if value is None:
            continue
        if isinstance(own, Section):
            _take(own, checked(name, value, dict))
        else:
            # LitGPT's other commands have more precisions.
            setattr(section, field.name, checked(name, value, str if name == "precision" else field.type))
