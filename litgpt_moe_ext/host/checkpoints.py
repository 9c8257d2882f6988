"""How LitGPT reads and writes the configuration of a model that needs the plugin."""

import re
import warnings
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from litgpt_moe_ext import __version__
from litgpt_moe_ext.config.fields import uses_plugin
from litgpt_moe_ext.config.litgpt_fields import check_ranges
from litgpt_moe_ext.errors import PERHAPS_OF_AN_EXTENSION, SettingsError
from litgpt_moe_ext.host.config import extend_config, fields_to_save
from litgpt_moe_ext.host.replaced import wrapping

if TYPE_CHECKING:
    from litgpt_moe_ext.config.types import Config as ExtendedConfig

# Written first into the `model_config.yaml` of a model that needs the plugin. Plain LitGPT then fails with an error
# that names this package ("unexpected keyword argument '_requires_litgpt_moe_ext'") instead of one about some inner
# field.
REQUIRES_MARK = "_requires_litgpt_moe_ext"
WEIGHTS_FILE, CONFIG_FILE = "lit_model.pth", "model_config.yaml"
"""LitGPT's names of the files of a checkpoint."""


def add_fields(config: ModuleType) -> None:
    """Add the fields of the plugin, and their rules, to `litgpt.config.Config`, in place."""
    extend_config(config.Config)


def understand_mark(config: ModuleType) -> None:
    """Let `Config.from_file` read configurations with the mark, and explain fields of other plugins and extensions."""
    original = config.Config.from_file.__func__

    @classmethod
    @wraps(original)
    def from_file(cls: type, path: str | Path, **kwargs: Any) -> Any:
        import yaml

        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
        if not isinstance(content, dict) or REQUIRES_MARK not in content:
            return original(cls, path, **kwargs)
        _check_written_by(content.pop(REQUIRES_MARK), path)
        refuse_unknown_fields(content, str(path))
        return cls(**{**content, **kwargs})

    config.Config.from_file = from_file


def refuse_unknown_fields(content: dict[str, Any], where: str) -> None:
    """Raise SettingsError, with the remedy, if a saved configuration has a field that models do not have.

    Args:
        content: The configuration; it may have the mark.
        where: The file, and the setting that named it, for the error.
    """
    from litgpt.config import Config

    from litgpt_moe_ext.extend import load_extensions

    load_extensions()  # those that were being imported when LitGPT was
    for name in content:
        if name not in Config.__dataclass_fields__ and name != REQUIRES_MARK:
            raise SettingsError(
                f"{where} has the field {name}, which this version does not know{PERHAPS_OF_AN_EXTENSION}, or else "
                "upgrade"
            )


def read_fields(checkpoint_dir: Path, setting: str = "checkpoint_dir") -> dict[str, Any]:
    """Return the content of the `model_config.yaml` of a checkpoint, whether or not it describes a model.

    Args:
        checkpoint_dir: The directory.
        setting: Which setting named it, for errors.

    Raises:
        SettingsError: If it holds no values by name.
    """
    import yaml

    from litgpt_moe_ext.files.archives import COPY_AGAIN, shortened

    file = checkpoint_dir / CONFIG_FILE
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:  # ValueError: not UTF-8, or an odd number
        raise SettingsError(f"{setting}: {file} cannot be read ({shortened(error)}); {COPY_AGAIN}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise SettingsError(f"{setting}: {file} holds no model configuration; {COPY_AGAIN}")
    return values


def read_config(checkpoint_dir: Path, setting: str = "checkpoint_dir") -> "ExtendedConfig":
    """Return the model that the `model_config.yaml` of a checkpoint describes.

    Args:
        checkpoint_dir: The directory.
        setting: Which setting named it, for errors.

    Raises:
        SettingsError: If it describes none.
    """
    from litgpt.config import Config

    from litgpt_moe_ext.files.archives import COPY_AGAIN, shortened

    file, values = checkpoint_dir / CONFIG_FILE, read_fields(checkpoint_dir, setting)
    refuse_unknown_fields(values, f"{setting}: {file}")
    try:
        check_ranges(values)
        return cast("ExtendedConfig", Config.from_file(file))  # which knows the mark of this package
    except (TypeError, ValueError, AssertionError) as error:  # how LitGPT and this package judge fields and values
        raise SettingsError(
            f"{setting}: {file} describes no model that this version knows: {shortened(error)}; upgrade it, or "
            f"{COPY_AGAIN}"
        ) from error


def write_mark(utils: Any) -> None:
    """Leave unused fields and backends out of saved configurations, and mark those that need the plugin."""
    from litgpt.config import Config

    @wrapping(utils, "asdict")
    def asdict(original: Any, obj: Any, **kwargs: Any) -> Any:
        result = original(obj, **kwargs)
        if not isinstance(obj, Config):
            return result
        result = fields_to_save(result)
        return {REQUIRES_MARK: __version__, **result} if uses_plugin(cast("ExtendedConfig", obj)) else result


def _check_written_by(version: str, path: str | Path) -> None:
    if _minor_version(version) > _minor_version(__version__):
        warnings.warn(
            f"{path} was written by litgpt_moe_ext {version}, newer than the installed {__version__}; upgrade if it "
            "fails to load.",
            RuntimeWarning,
            stacklevel=3,
        )


def _minor_version(version: str) -> tuple[int, ...]:
    # Works for 0.2rc1 too; empty if it is not a version.
    found = re.match(r"(\d+)\.(\d+)", str(version))
    return () if found is None else tuple(map(int, found.groups()))
