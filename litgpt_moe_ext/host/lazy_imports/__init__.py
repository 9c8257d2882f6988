"""Postpone what LitGPT's imports load and never use.

`import litgpt.pretrain` imports all of torchmetrics, because lightning asks for its version and two base classes and
LitGPT for one running mean. torchmetrics imports torchvision, transformers' model classes, scikit-learn, pandas and
scipy.signal, and matplotlib for methods that plot. Lightning and LitGPT also import torch's compiler, to ask whether an
object was compiled, to keep two methods from being compiled and to set options that only `--compile` needs. Together
that is two thirds of the time to start. torch's FLOP counter imports Triton, to recognise its functions.

`import litgpt` itself loads lightning and all that LitGPT can do, of which whoever only describes a run needs a few
modules.

Nothing here pretends to be a module. The `__init__` of torchmetrics and of litgpt run, statement by statement, in their
own module objects: what loads something big waits until somebody asks for a name or a submodule beyond a few, and then
runs in its original order. Ten modules of lightning, LitGPT, torch and torchmetrics are executed from their own source
with the few expressions changed that load the compiler, matplotlib, or what is hardly ever called: a class that
`isinstance` asks about, and a function that tells whether code is being compiled, have stand-ins that are right as long
as the compiler is not loaded and give way once it is. So has the base class of data modules (`data_modules`), only in
a process that describes a run.

A process gets this when it imports LitGPT, or the parts of this package that do, and only for modules that are not
loaded by then. Python 3.15 has lazy imports of its own (PEP 810), which will replace this.
"""

from litgpt_moe_ext.host import autoload
from litgpt_moe_ext.host.lazy_imports import modules, packages


def install() -> None:
    """Postpone imports in this process from now on; modules that are loaded already stay as they are."""
    for name in packages.PACKAGES:
        autoload.execute_with(name, packages.execute_split)
    for name in modules.WITHOUT_COMPILER:
        autoload.execute_with(name, modules.execute_without_compiler)
    for name in modules.CALLED_RARELY:
        autoload.execute_with(name, modules.execute_without_function)
    autoload.execute_with(modules.PLOTS, modules.execute_without_matplotlib)
