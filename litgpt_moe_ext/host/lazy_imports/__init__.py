"""Postpones modules that LitGPT's imports load and never use.

`import litgpt.pretrain` imports all of torchmetrics, because lightning needs its version and two base classes, and
LitGPT one running mean. torchmetrics imports torchvision, transformers' model classes, scikit-learn, pandas and
scipy.signal, and matplotlib for methods that plot. Lightning and LitGPT also import torch's compiler, to check whether
an object was compiled, to keep two methods from being compiled and to set options that only `--compile` needs. Together
that is two thirds of the time to start. torch's FLOP counter imports Triton, to recognise its functions.

`import litgpt` itself loads lightning and all features of LitGPT, while a process that only describes a run needs a few
modules.

Nothing here pretends to be a module. The `__init__` of torchmetrics and of litgpt run, statement by statement, in their
own module objects: statements that load something big wait until a name or submodule beyond a few is needed, and then
run in their original order. Ten modules of lightning, LitGPT, torch and torchmetrics are executed from their own
source, except for the few expressions that load the compiler, matplotlib, or functions that are hardly ever called. A
class used in `isinstance`, and a function that tells whether code is being compiled, have stand-ins that are correct
until the compiler is loaded and are replaced then. So has the base class of data modules (`data_modules`), only in a
process that describes a run.

This applies to processes that import LitGPT, or the parts of this package that do, and only to modules that are not
loaded by then. Python 3.15 has lazy imports of its own (PEP 810), which will replace this.
"""

from litgpt_moe_ext.host import autoload
from litgpt_moe_ext.host.lazy_imports import modules, packages


def install() -> None:
    """Postpone imports in this process from now on; leave modules alone that are already loaded."""
    for name in packages.PACKAGES:
        autoload.execute_with(name, packages.execute_split)
    for name in modules.WITHOUT_COMPILER:
        autoload.execute_with(name, modules.execute_without_compiler)
    for name in modules.CALLED_RARELY:
        autoload.execute_with(name, modules.execute_without_function)
    autoload.execute_with(modules.PLOTS, modules.execute_without_matplotlib)
