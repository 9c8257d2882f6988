"""Run a callback after a module of LitGPT has been imported, without importing it.

This is loaded by every interpreter of the environment (through the `.pth` file), so it imports nothing but `os` and
`sys`, which are loaded anyway, and costs one dictionary look-up per later import.
"""

import os
import sys

DISABLE_VARIABLE = "LITGPT_MOE_EXT_DISABLE"


def disabled() -> bool:
    """Whether the user switched the plugin off (any value but the empty string and 0)."""
    return os.environ.get(DISABLE_VARIABLE, "") not in ("", "0")


def require_enabled() -> None:
    """Raise RuntimeError if the plugin is switched off."""
    if disabled():
        raise RuntimeError(
            f"litgpt_moe_ext is switched off by {DISABLE_VARIABLE}={os.environ[DISABLE_VARIABLE]}; unset it to train "
            "or open models that use the plugin's classes."
        )


class _AfterImport:
    """A finder that finds nothing itself: it lets the others find a module and adds a callback to its execution."""

    def __init__(self):
        self.callbacks = {}

    def find_spec(self, name, path=None, target=None):
        if name not in self.callbacks:
            return None
        for finder in sys.meta_path:
            find_spec = getattr(finder, "find_spec", None)
            if finder is self or find_spec is None:
                continue
            spec = find_spec(name, path, target)
            if spec is not None:
                break
        else:
            return None
        loader = spec.loader

        def exec_module(module):
            # Only this import is wrapped; whoever inspects or reloads the module later meets the original loader.
            del loader.exec_module
            loader.exec_module(module)
            for callback in self.callbacks.pop(name, ()):
                callback(module)

        loader.exec_module = exec_module
        return spec


_after_import = _AfterImport()


def when_imported(name: str, callback) -> None:
    """Call `callback(module)` once the module `name` is imported; at once if it already is.

    Args:
        name: Full name of the module.
        callback: Called with the executed module. What it raises becomes an error of the import.
    """
    module = sys.modules.get(name)
    spec = getattr(module, "__spec__", None)
    if module is not None and not getattr(spec, "_initializing", False):
        callback(module)
        return
    _after_import.callbacks.setdefault(name, []).append(callback)
    if _after_import not in sys.meta_path:
        sys.meta_path.insert(0, _after_import)


def _register(_module) -> None:
    try:
        from litgpt_moe_ext.host.seams import register

        register()
    except Exception as error:
        # Whoever only shares an environment with the plugin must be able to go on with plain LitGPT. Users of the
        # plugin meet the same error from `litgpt_moe_ext.register()`.
        import warnings

        warnings.warn(f"litgpt_moe_ext could not extend LitGPT and is inactive: {error}", RuntimeWarning, stacklevel=2)


def install() -> None:
    """Arrange that LitGPT is extended when its model definition is imported. Does nothing if switched off."""
    if not disabled():
        when_imported("litgpt.model", _register)
