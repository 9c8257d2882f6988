"""The backends that can compute the routed experts, by name, and which of them is preferred where.

`register_backend` adds one from outside this package; it is then chosen, announced and forced (`expert_backend` in the
model configuration) like the package's own.
"""

from litgpt_moe_ext.entries import require
from litgpt_moe_ext.moe.kernels.backend import ExpertBackend, Place, Preference
from litgpt_moe_ext.moe.kernels.own import OWN_BACKENDS, OWN_PREFERENCES
from litgpt_moe_ext.moe.registry import EXPERT_BACKENDS

BACKENDS: dict[str, ExpertBackend] = {backend.name: backend for backend in OWN_BACKENDS}
OWN = frozenset(BACKENDS)
"""Names of this package's backends; the results of others are checked."""
PREFERENCES: list[Preference] = list(OWN_PREFERENCES)
# Cached choices by place and forced backend, which every layer looks up in every micro-batch.
CHOSEN: dict[tuple[Place, str | None], str] = {}


def register_backend(backend: ExpertBackend, *preferences: Preference) -> None:
    """Register a backend under its name, preferred over all others where `preferences` say.

    Raises:
        ValueError: If the name is taken, or the arguments are not a backend and preferences of known backends.
    """
    require(backend.name if isinstance(backend, ExpertBackend) else "backend", backend, ExpertBackend)
    name = backend.name
    if BACKENDS.get(name, backend) != backend:
        raise ValueError(f"{name!r} is registered already; choose another name")
    for field in ("function", "obstacle"):
        if not callable(getattr(backend, field)):
            raise ValueError(f"{name!r}: {field} is {getattr(backend, field)!r}; it must be a function")
    for preference in preferences:
        require(name, preference, Preference)
        known = [*BACKENDS, name]
        given = preference.backends
        if not isinstance(given, (tuple, list)) or any(each not in known for each in given):
            raise ValueError(f"{name!r}: backends is {given!r}; it must be a tuple of names of {', '.join(known)}")
    if name not in BACKENDS:
        EXPERT_BACKENDS.append(name)
    BACKENDS[name] = backend
    # A script and the entry point of its package may both call this.
    PREFERENCES[:0] = [preference for preference in preferences if preference not in PREFERENCES]
    CHOSEN.clear()
