"""Prints, as JSON, which names of LitGPT, litdata, lightning and torch the plugin changes. Run by `test_seams`."""

import importlib
import inspect
import json
import sys
from types import ModuleType

from litgpt_moe_ext.host import autoload

# Import LitGPT without the plugin's part in it, except for the imports that it postpones.
autoload._finder.after.pop("litgpt.model")


for module in (
    "litgpt.pretrain",
    "litgpt.finetune.adapter",
    "litgpt.finetune.adapter_v2",
    "litgpt.finetune.full",
    "litgpt.finetune.lora",
    "litgpt.lora",
    "litgpt.adapter_v2",
    "litgpt.generate.adapter",
    "litgpt.generate.adapter_v2",
    "litgpt.generate.full",
    "litgpt.scripts.convert_lit_checkpoint",
    "litgpt.scripts.merge_lora",
    "litgpt.scripts.validate",
    "litgpt.scripts.convert_pretrained_checkpoint",
    "litgpt.eval.evaluate",
    "litgpt.__main__",
    "litdata.streaming.item_loader",
    "torch.utils.flop_counter",
):
    importlib.import_module(module)


def contents(owner: ModuleType | type) -> dict[str, object]:
    return {name: value for name, value in vars(owner).items() if name not in ("__builtins__", "__dict__")}


def snapshot() -> dict[str, object]:
    """Return every name, `module.name` or `module.Class.name`, with the object it stands for."""
    names: dict[str, object] = {}
    packages = ("litgpt", "litdata", "lightning", "torch")
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] not in packages or not isinstance(module, ModuleType):
            continue
        for name, value in contents(module).items():
            names[f"{module_name}.{name}"] = value
            if inspect.isclass(value) and value.__module__ == module_name:
                names.update({f"{module_name}.{name}.{inner}": member for inner, member in contents(value).items()})
    return names


before = snapshot()
loaded = set(sys.modules)
importlib.import_module("litgpt_moe_ext").register()
after = snapshot()
changed = sorted(
    name
    for name in before.keys() | after.keys()
    if name not in before or name not in after or before[name] is not after[name]
)
# The number of hooks, and a submodule that is imported and becomes an attribute of its package, are no changes.
new = set(sys.modules) - loaded
changed = [
    name
    for name in changed
    if name not in sys.modules
    and not any(name.startswith(f"{module}.") for module in new)
    and name != "torch.utils.hooks.RemovableHandle.next_id"
]
print("REPORT" + json.dumps(changed))
