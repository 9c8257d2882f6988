"""Run a callback after a module of LitGPT has been imported, without importing it.

This is loaded by every interpreter of the environment (through the `.pth` file), so it imports nothing but `_thread`,
`os` and `sys`, which are loaded anyway, and costs one dictionary look-up per later import.
"""

import _thread
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


class _Finder:
    """A finder that finds nothing itself: it lets the others find a module and takes part in its execution.

    Attributes:
        before: Module name to functions that are called before the module is looked for.
        before_submodules: Package name to a function that is called with the name of a submodule that is looked for.
        instead: Module name to a function of the module and its loader that executes the module.
        after: Module name to functions that are called with the executed module.
        again: The same for every execution but the first of this process, as when a module is reloaded.
        executed: Modules that have been executed and are with these functions, and in which thread.
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
            # What was imported before it has imported it, too; a second execution would make its classes anew.
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
            # Only this execution is wrapped; whoever inspects the module later meets the original loader.
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
    """A loader of a module that is there already."""

    def __init__(self, module):
        self._module, self._spec = module, module.__spec__

    def create_module(self, _spec):
        return self._module

    def exec_module(self, module):
        module.__spec__ = self._spec


def _spec_of_loaded(module):
    spec = type(module.__spec__)(module.__name__, _Loaded(module), origin=module.__spec__.origin)
    spec.submodule_search_locations = module.__spec__.submodule_search_locations
    # Python prefers the spec of a module that has appeared meanwhile to the one that it is given.
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
        callback: Called with the executed module. What it raises becomes an error of the import.
    """
    module = sys.modules.get(name)
    spec = getattr(module, "__spec__", None)
    if module is not None and not getattr(spec, "_initializing", False):
        callback(module)
        return
    _use_finder().after.setdefault(name, []).append(callback)


def when_executed_again(name: str, callback) -> None:
    """Call `callback(module)` whenever the module `name` is executed after it has been imported, as by a reload."""
    _use_finder().again.setdefault(name, []).append(callback)


_waiting: dict[tuple[int, str], list] = {}  # functions that wait, by thread and the package that it executes


class Executing:
    """A scope in which this thread executes the `__init__` of a package; behind it follows what waits for that."""

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
    """Call `callback()`: at once, or when this thread has executed the `__init__` of `package`, if it is doing so."""
    waiting = _waiting.get((_thread.get_ident(), package))
    if waiting is None:
        callback()
    else:
        waiting.append(callback)


def is_initializing(name: str) -> bool:
    """Return whether a module is being imported; to the functions that are called after its execution it is whole."""
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
        callback: Called with the submodule's name without the package's; None to stop.
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
        # Whoever only shares an environment with the plugin must be able to go on with plain LitGPT. Users of the
        # plugin meet the same error from `litgpt_moe_ext.register()`.
        import warnings

        warnings.warn(f"litgpt_moe_ext could not extend LitGPT and is inactive: {error}", RuntimeWarning, stacklevel=2)


# What imports LitGPT or lightning sooner or later; nothing else of a process is touched.
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
        when_imported("litgpt.model", _register)
