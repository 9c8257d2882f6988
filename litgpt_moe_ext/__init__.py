"""Mixture-of-Experts layers, an attention variant and training hooks for LitGPT.

Importing the package is enough to make LitGPT know its classes. The import itself loads neither torch nor LitGPT: it
only arranges that LitGPT's modules are extended once somebody imports them (or at once, if they already are). A
`.pth` file in the installed wheel does the same import in every interpreter of the environment, so that plain
`litgpt` commands open the plugin's checkpoints. Set `LITGPT_MOE_EXT_DISABLE=1` to switch everything off.
"""

from litgpt_moe_ext.host import autoload

__version__ = "0.1.0"

autoload.install()


def register() -> None:
    """Extend LitGPT now, importing it if need be.

    Does nothing when LitGPT is extended already.

    Raises:
        RuntimeError: If the installed LitGPT lacks something the plugin builds on (the message names it).
        SettingsError: If the plugin is switched off by `LITGPT_MOE_EXT_DISABLE=1`.
    """
    autoload.require_enabled()
    from litgpt_moe_ext.host.registration import register as register_in_litgpt

    register_in_litgpt()
    from litgpt_moe_ext.extend import load_extensions

    autoload.when_whole("litgpt", load_extensions)


__all__ = ["__version__", "register"]
