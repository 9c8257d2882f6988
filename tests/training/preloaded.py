"""Everything that a training process imports sooner or later, for the server whose forks are such processes.

It must import only, and start no thread: a fork has the thread that forked, and locks that others held stay locked.
"""

import atexit
import gc
import importlib
import os
import threading

# What a run imports where it needs it, and what takes long of that.
for module in (
    "attr",
    "pytest",
    "litgpt.pretrain",
    "torch._inductor.compile_fx",
    "torch._dynamo.repro.after_dynamo",
    "litgpt_moe_ext.cli.train",
    "litgpt_moe_ext.training.run",
    "litgpt_moe_ext.training.phases.equip",
    "litgpt_moe_ext.training.phases.report",
    "litgpt_moe_ext.training.loop",
    "litgpt_moe_ext.data.modules.corpus",
):
    importlib.import_module(module)

assert threading.active_count() == 1
# The collector of a fork would write to every object, and so copy all of this memory.
gc.collect()
gc.freeze()
# At the end of the server, Triton would list what it has not freed.
atexit.register(os._exit, 0)
