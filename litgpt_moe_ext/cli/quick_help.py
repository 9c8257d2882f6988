"""Answer `--help` without loading torch and LitGPT, which takes many seconds.

`import litgpt` loads everything LitGPT has. Its argument classes need none of that: with an empty package of that
name in place, their modules are loaded alone. The one heavy type of the signature, the data module, is replaced by an
empty class. This is done in a process that prints the help and ends.
"""

import importlib.util
import sys
import types


def print_help() -> None:
    """Print the help of `run_train.py`. Only for a process that ends afterwards."""
    if "litgpt" not in sys.modules:
        _light_litgpt()
    from litgpt_moe_ext.cli.train import build_parser

    build_parser().print_help()


def _light_litgpt() -> None:
    package = types.ModuleType("litgpt")
    package.__path__ = importlib.util.find_spec("litgpt").submodule_search_locations
    data = types.ModuleType("litgpt.data")
    data.DataModule = type("DataModule", (), {"__module__": "litgpt.data"})
    sys.modules.update({"litgpt": package, "litgpt.data": data})
