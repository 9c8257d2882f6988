"""The model of a run."""

from typing import TYPE_CHECKING

from litgpt_moe_ext.errors import SettingsError

if TYPE_CHECKING:
    from litgpt.config import Config

    from litgpt_moe_ext.training.settings.tree import Settings


def model_of(settings: "Settings") -> "Config":
    """Return the model configuration of a run.

    Raises:
        SettingsError: If none is given, or LitGPT has no model of that name.
    """
    from litgpt.config import Config

    if settings.model_config is not None:
        if settings.model_name not in ("", settings.model_config.name):
            raise SettingsError(
                f"model_name: {settings.model_name!r} has no effect beside model_config; leave it out, or set "
                "model_config to null"
            )
        return settings.model_config
    if not settings.model_name:
        raise SettingsError(
            "model_config: null must be a model (see configs/), unless model_name is the name of one of LitGPT's"
        )
    try:
        config = Config.from_name(settings.model_name)
    except ValueError as error:
        raise SettingsError(
            f"model_name: {settings.model_name!r} must be one of LitGPT's models; `litgpt pretrain list` prints them"
        ) from error
    assert config is not None
    return config
