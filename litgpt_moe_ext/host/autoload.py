"""Run a callback after a module of LitGPT has been imported, without importing it.

Every interpreter of the environment loads this module (through the `.pth` file), so it imports only `_thread`, `os` and
`sys`, which are loaded anyway, and costs one dictionary look-up per later import.
"""

import _thread
import os
import sys

DISABLE_VARIABLE = "LITGPT_MOE_EXT_DISABLE"


def disabled() -> bool:
    """Return whether the user switched the plugin off: by any value that does not deny it."""
    return os.environ.get(DISABLE_VARIABLE, "").lower() not in ("", "0", "false", "no", "off")


def require_enabled() -> None:
    """Raise SettingsError if the plugin is switched off."""
    if disabled():
        from litgpt_moe_ext.errors import SettingsError

        raise SettingsError(
            f"{DISABLE_VARIABLE}: {os.environ[DISABLE_VARIABLE]!r} switches litgpt_moe_ext off; unset it to train or "
            "open models that use the plugin's classes"
        )


class _Finder:
    """A finder that finds nothing itself: it lets other finders find a module and hooks into its execution.

    Attributes:
        before: Module name to functions that are called before the module is looked for.
        before_submodules: Package name to a function that is called with the name of each submodule before it is looked
            for.
        instead: Module name to a function of the module and its loader that executes the module.
        after: Module name to functions that are called with the executed module.
        again: The same for every execution after the first, as when a module is reloaded.
        executed: Executed modules for which these functions are running, with the thread.
    """

    def __init__(self):
        self.before = {}
        self.before_submodules = {}
        self.instead = {}
        self.after = {}
        self.again = {}
        self.executed = {}

    def find_spec(self, name, path=None, target=None):
        callbacks = self.before.pop(name, ())
        for callback in callbacks:
            callback()
        watched = False
        if self.before_submodules:
            package, _, submodule = name.partition(".")
            if watched := bool(submodule) and package in self.before_submodules:
                self.before_submodules[package](submodule)
        if (callbacks or watched) and target is None and name in sys.modules:
            # A callback has imported the module itself; executing it again would create its classes anew.
            return _spec_of_loaded(sys.modules[name])
        if not any(name in known for known in (self.after, self.instead, self.again)):
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
            # Wrap only this execution, so that the module keeps its original loader.
            del loader.exec_module
            execute = self.instead.pop(name, None)
            if execute is None:
                loader.exec_module(module)
            else:
                execute(module, loader)
            self.executed[name] = _thread.get_ident()
            package, _, short_name = name.rpartition(".")
            if package in sys.modules:  # as the import system does a little later
                setattr(sys.modules[package], short_name, module)
            try:
                for callback in self.after.pop(name, None) or self.again.get(name, ()):
                    callback(module)
            finally:
                del self.executed[name]

        loader.exec_module = exec_module
        return spec


class _Loaded:
    """A loader of a module that is already loaded."""

    def __init__(self, module):
        self._module, self._spec = module, module.__spec__

    def create_module(self, _spec):
        return self._module

    def exec_module(self, module):
        module.__spec__ = self._spec


def _spec_of_loaded(module):
    spec = type(module.__spec__)(module.__name__, _Loaded(module), origin=module.__spec__.origin)
    spec.submodule_search_locations = module.__spec__.submodule_search_locations
    # Python prefers the spec of a module that has been loaded in the meantime to the one that it gets here.
    module.__spec__ = spec
    return spec


_finder = _Finder()


def _use_finder() -> _Finder:
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    return _finder


def when_imported(name: str, callback) -> None:
    """Call `callback(module)` once the module `name` is imported; at once if it already is.

    Args:
        name: Full name of the module.
        callback: Called with the executed module. Its exceptions become errors of the import.
    """
    module = sys.modules.get(name)
    spec = getattr(module, "__spec__", None)
    if module is not None and not getattr(spec, "_initializing", False):
        callback(module)
        return
    _use_finder().after.setdefault(name, []).append(callback)


def when_executed_again(name: str, callback) -> None:
    """Call `callback(module)` whenever the module `name` is executed again, as by a reload."""
    _use_finder().again.setdefault(name, []).append(callback)


_waiting: dict[tuple[int, str], list] = {}  # postponed callbacks, by thread and the package that it executes


class Executing:
    """A scope in which this thread executes the `__init__` of a package; postponed callbacks run at its end."""

    def __init__(self, package: str):
        self._key = _thread.get_ident(), package
        self._outermost = self._key not in _waiting

    def __enter__(self):
        _waiting.setdefault(self._key, [])

    def __exit__(self, *_error):
        if self._outermost:
            for callback in _waiting.pop(self._key):
                callback()


def when_whole(package: str, callback) -> None:
    """Call `callback()` at once, or, if this thread is executing the `__init__` of `package`, after that."""
    waiting = _waiting.get((_thread.get_ident(), package))
    if waiting is None:
        callback()
    else:
        waiting.append(callback)


def is_initializing(name: str) -> bool:
    """Return whether a module is being imported; false for callbacks that run after its execution."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return bool(getattr(spec, "_initializing", False)) and _finder.executed.get(name) != _thread.get_ident()


def before_import(name: str, callback) -> None:
    """Call `callback()` once, before the module `name` is looked for. Does nothing if the module is imported."""
    if name not in sys.modules:
        _use_finder().before.setdefault(name, []).append(callback)


def before_submodules(package: str, callback) -> None:
    """Call `callback(submodule)` before each submodule of the top-level package `package` is looked for.

    Args:
        package: Name of the package.
        callback: Called with the submodule's name relative to the package; None to remove the callback.
    """
    if callback is None:
        _finder.before_submodules.pop(package, None)
    else:
        _use_finder().before_submodules[package] = callback


def execute_with(name: str, execute) -> None:
    """Have `execute(module, loader)` execute the module `name` when it is imported. Does nothing if it already is."""
    if name not in sys.modules:
        _use_finder().instead[name] = execute


def _register(_module) -> None:
    try:
        from litgpt_moe_ext.host.registration import register

        register()
    except Exception as error:
        # A program that only shares an environment with the plugin must be able to use plain LitGPT. Users of the
        # plugin get the same error from `litgpt_moe_ext.register()`.
        import warnings

        warnings.warn(f"litgpt_moe_ext could not extend LitGPT and is inactive: {error}", RuntimeWarning, stacklevel=2)


def _import_model() -> None:
    # Else `litgpt.api` imports `litgpt.chat.base`, and that the model, at whose import changes are arranged: too late
    # for these two.
    import litgpt.model  # noqa: F401


# Packages that import LitGPT or lightning sooner or later; processes without them are left alone.
_IMPORTERS = (
    "litgpt",
    "litgpt_moe_ext.attention",
    "litgpt_moe_ext.cli",
    "litgpt_moe_ext.data",
    "litgpt_moe_ext.evaluation",
    "litgpt_moe_ext.export",
    "litgpt_moe_ext.inspect",
    "litgpt_moe_ext.model_size",
    "litgpt_moe_ext.moe",
    "litgpt_moe_ext.training",
)


def _postpone_imports() -> None:
    for name in _IMPORTERS:
        _finder.before.pop(name, None)
    from litgpt_moe_ext.host import lazy_imports

    lazy_imports.install()


def install() -> None:
    """Arrange that LitGPT is extended when its model definition is imported. Does nothing if switched off."""
    if not disabled():
        for name in _IMPORTERS:
            before_import(name, _postpone_imports)
        before_import("litgpt.api", _import_model)
        when_imported("litgpt.model", _register)
