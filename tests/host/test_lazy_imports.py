"""Postponed imports: what is not needed is not loaded, and what is asked for is the real thing."""

import importlib
import json
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from litgpt_moe_ext.host import autoload
from litgpt_moe_ext.host.lazy_imports import packages
from litgpt_moe_ext.host.lazy_imports.packages import Package
from litgpt_moe_ext.kernels.compiled import assume_constant_result
from tests.host.test_guest_rule import HERE, run


def report(disabled: bool) -> dict:
    result = run([str(HERE / "host" / "lazy_report.py")], disabled)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.rpartition("REPORT")[2])


@pytest.fixture(scope="module")
def lazy() -> dict:
    return report(disabled=False)


@pytest.mark.slow
def test_litgpt_loads_nothing_needless(lazy):
    """`test_guest_rule` sees the same of fewer imports."""
    assert lazy["loaded"] == []
    assert lazy["accuracy"] == [0.75, 0.75]
    assert lazy["attributes"] == lazy["public"] == []
    assert lazy["compiled"][:4] == [True] * 4
    assert lazy["left alone"] == [True, True]
    assert [lazy[name] for name in ("hooked", "Triton function", "no Triton function")] == [True, True, False]


@pytest.mark.slow
def test_whoever_asks_gets_what_it_would_have_had(lazy):
    eager = report(disabled=True)
    assert {"transformers", "scipy", "torch._dynamo"} <= set(eager["loaded"])
    for name in lazy.keys() - {"loaded", "path"}:
        assert lazy[name] == eager[name], name


def test_a_process_without_litgpt_is_left_alone():
    code = (
        "import sys, json, asyncio, unittest.mock\n"
        "from litgpt_moe_ext.host.autoload import _finder\n"
        "print('litgpt_moe_ext.host.lazy_imports' in sys.modules, _finder.instead, _finder.before_submodules)"
    )
    assert run(["-c", code]).stdout == "False {} {}\n"


def test_the_mark_for_constants_is_that_of_torch():
    def ours() -> int:
        return 1

    def torchs() -> int:
        return 1

    assert vars(assume_constant_result(ours)) == vars(torch.compiler.assume_constant_result(torchs)) != {}


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "import torchmetrics, litgpt.pretrain; torchmetrics.functional.accuracy",
        "import litgpt; from torchmetrics.classification import Accuracy; from torchmetrics import AUROC",
        "import litgpt; from torchmetrics import *; Accuracy, functional",
        "import lightning, litgpt_moe_ext.training.loop, torchmetrics; torchmetrics.text.BLEUScore",
        "import litgpt_moe_ext.training.loop, transformers, torchvision; transformers.AutoModel, torchvision.ops.nms",
        "import torch._dynamo, litgpt.generate.base; litgpt.generate.base.torch._dynamo.config.suppress_errors",
        "import litgpt_moe_ext.training.loop, torch; torch.optim.AdamW([torch.zeros(1, requires_grad=True)]).step()",
    ],
)
def test_orders_of_import(code):
    result = run(["-c", code])
    assert result.returncode == 0, result.stderr


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with the shape of torchmetrics: light submodules that need its logger, and a heavy rest."""
    name = f"lazy_package_{tmp_path.name.replace('-', '_')}"
    folder = tmp_path / name
    folder.mkdir()
    files = {
        "__init__": f"""
            import os
            calls = []
            calls.append("start")
            log = "the package's own"
            import {name}_heavy
            calls.append({name}_heavy.__name__)
            from {name} import functional
            from {name}.metric import Metric, helper as aid
            from .functional import accuracy
            calls.append(accuracy.__name__)
            kind = accuracy.__name__
            __all__ = ["Metric", "accuracy", "aid", "functional"]
        """,
        "base": f"from {name} import log\nfrom {name}.metric import Metric",
        "metric": f"from {name}.base import log\nclass Metric: log = log\ndef helper(): pass",
        "functional": f"""
            import {name}.aside, {name}.base
            from {name}.metric import Metric
            def accuracy(): return Metric
        """,
        "aside": "",
        "curious": f"from {name} import accuracy",
    }
    for file, text in files.items():
        (folder / f"{file}.py").write_text(textwrap.dedent(text))
    (tmp_path / f"{name}_heavy.py").write_text("import time; time.sleep(0.05)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(
        packages.PACKAGES,
        name,
        Package(names=frozenset({"Metric"}), submodules=("base", "metric", "curious"), first="base"),
    )
    autoload.execute_with(name, packages.execute_split)
    yield name
    autoload.before_submodules(name, None)
    for module in [module for module in sys.modules if module.startswith(name)]:
        del sys.modules[module]


def loaded(name: str) -> list[str]:
    return sorted(module.partition(".")[2] for module in sys.modules if module.startswith(f"{name}."))


def test_a_split_package_waits(package):
    module = importlib.import_module(package)
    assert module.calls == ["start"]
    assert (loaded(package), f"{package}_heavy" in sys.modules) == ([], False)
    assert module.Metric.log == "the package's own"
    assert loaded(package) == ["base", "metric"]
    with pytest.raises(AttributeError, match="__wrapped__"):
        module.__wrapped__  # noqa: B018
    assert module.calls == ["start"]


@pytest.mark.parametrize(
    "use",
    [
        "import {0}; {0}.accuracy",
        "import {0}; {0}.aid",
        "import {0}; {0}.kind",
        "import {0}; assert 'accuracy' in dir({0})",
        "import {0}.functional",
        "from {0}.functional import accuracy",
        "from {0} import functional",
        "from {0} import *; accuracy",
        "from {0}.metric import Metric; from {0} import Metric as Same, accuracy; assert Metric is Same",
    ],
)
def test_a_split_package_completes_once_in_its_own_order(package, use):
    exec(use.format(package), {})
    module = sys.modules[package]
    assert module.calls == ["start", f"{package}_heavy", "accuracy"]
    assert module.accuracy() is module.Metric is sys.modules[f"{package}.metric"].Metric
    assert not {"__getattr__", "__dir__"} & set(vars(module))
    with pytest.raises(AttributeError, match="nothing"):
        module.nothing  # noqa: B018


def test_a_name_that_nobody_offers_completes_nothing(package):
    module = importlib.import_module(package)
    assert not hasattr(module, "Accuracy")
    assert module.calls == ["start"]
    assert module.aside, "the rest imports it, so it is there as well"
    assert module.accuracy() is module.Metric


def test_a_light_submodule_that_asks_for_more_meets_a_circular_import(package):
    """The rest must not run while a submodule that it needs is half done."""
    with pytest.raises(ImportError, match="accuracy"):
        importlib.import_module(f"{package}.curious")
    assert importlib.import_module(package).accuracy().log == "the package's own"


def test_threads_see_a_split_package_whole(package):
    start = threading.Barrier(6)
    uses = ["accuracy", "Metric", "functional", "aid", "accuracy", "Metric"]

    def ask(name: str):
        start.wait()
        return getattr(importlib.import_module(package), name)

    with ThreadPoolExecutor(6) as pool:
        values = list(pool.map(ask, uses))
    module = sys.modules[package]
    assert values == [getattr(module, name) for name in uses]
    assert module.calls == ["start", f"{package}_heavy", "accuracy"]


def test_a_rest_that_fails_can_be_asked_again(package):
    module = importlib.import_module(package)
    heavy = Path(module.__file__).parents[1] / f"{package}_heavy.py"
    heavy.write_text("raise OSError('no disk')")
    with pytest.raises(OSError, match="no disk"):
        module.accuracy  # noqa: B018
    heavy.write_text("")
    importlib.invalidate_caches()
    assert module.accuracy() is module.Metric


@pytest.mark.slow
@pytest.mark.parametrize("first", ["from litgpt.config import Config", "from litgpt import Config"])
def test_a_submodule_asked_for_first_is_executed_once_and_extended(first):
    """`litgpt.config` imports what extends it before itself, which imports it in turn."""
    code = (
        f"{first}\n"
        "import importlib, sys, litgpt, litgpt.config, litgpt.model\n"
        "assert Config is litgpt.Config is litgpt.config.Config is litgpt.model.Config\n"
        "assert hasattr(Config, 'attention_class_name')\n"
        "assert type(litgpt.config.__spec__.loader).__name__ == 'SourceFileLoader'\n"
        "assert not {'lightning', 'litgpt.utils'} & set(sys.modules)\n"
        "assert litgpt.model.qkv_reassemble.__module__ == 'litgpt_moe_ext.host.lazy_imports.modules'\n"
        "import litgpt.pretrain\n"
        "assert litgpt.LLM.__module__ == 'litgpt.api'\n"
        "assert litgpt.model.qkv_reassemble.__module__ == 'litgpt.scripts.convert_hf_checkpoint'\n"
        "assert '__getattr__' not in vars(litgpt)\n"
    )
    result = run(["-c", code])
    assert result.returncode == 0, result.stderr


DATA_MODULES = """
import sys
from dataclasses import dataclass
from litgpt_moe_ext.host.lazy_imports import data_modules
data_modules.postpone()
from litgpt.data import Alpaca, DataModule
from litgpt_moe_ext.data import TokenShards
assert not {"lightning", "litgpt.utils"} & set(sys.modules)

@dataclass
class Plain(DataModule):
    size: int = 1

    def __post_init__(self):
        super().__init__()

class Saving(DataModule):
    def __init__(self, size):
        super().__init__()
        self.save_hyperparameters()

shards, plain = TokenShards("data"), Plain(2)
assert issubclass(Saving, DataModule) and isinstance(shards, DataModule) and isinstance(Alpaca(), DataModule)
assert not hasattr(type(shards), "prepare_tokenizer")
assert "lightning" not in sys.modules
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "need",
    [
        "import lightning",
        "assert shards.trainer is None",
        "assert Saving(3).hparams.size == 3",
        "assert not hasattr(plain, 'plan_run')",
    ],
)
def test_data_modules_wait_for_lightning(need):
    """Whatever needs it makes them lightning's, those as well that are made already."""
    code = (
        f"{DATA_MODULES}\n{need}\n"
        "from lightning import LightningDataModule\n"
        "import copy, litgpt.data.base\n"
        "assert litgpt.data.base.LightningDataModule is LightningDataModule\n"
        "assert DataModule.__mro__[1] is LightningDataModule in type(shards).__mro__\n"
        "for data in (shards, plain, Plain(5), Saving(3), copy.deepcopy(shards)):\n"
        "    assert isinstance(data, LightningDataModule)\n"
        "    assert (data.trainer, data.prepare_data_per_node) == (None, True)\n"
        "assert Saving(3).hparams.size == 3\n"
        "assert not hasattr(plain, 'nothing')\n"
    )
    result = run(["-c", code])
    assert result.returncode == 0, result.stderr
