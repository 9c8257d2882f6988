"""Plain `litgpt pretrain` compiles only where a compiler works and pays, as this package's training does.

For LitGPT's own models the choice is LitGPT's wherever a compiler works at all.
"""

import inspect
from typing import Any

from litgpt_moe_ext.config.fields import uses_plugin
from litgpt_moe_ext.host.replaced import wrapping
from litgpt_moe_ext.training.compilation import compile_scope, decide, decided, obstacle


def compile_where_it_works(pretrain: Any) -> None:
    """Let `main` of the module `litgpt.pretrain` decide, unless an enclosing scope has decided.

    Args:
        pretrain: The imported module.
    """

    @wrapping(pretrain, "main")
    def main(original: Any, fabric: Any, *args: Any, **kwargs: Any) -> Any:
        config = inspect.signature(original).bind(fabric, *args, **kwargs).arguments["config"]
        device_type = fabric.device.type
        if decided() or (obstacle(device_type) is None and not uses_plugin(config)):
            return original(fabric, *args, **kwargs)
        decision = decide("auto", config, device_type)
        fabric.print(decision)
        with compile_scope(decision):
            return original(fabric, *args, **kwargs)
