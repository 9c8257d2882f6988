"""Torch's kernels for its meta device, which wait until they are needed."""

import sys

import pytest

from tests.runs import run_command

START = """
import sys
from litgpt_moe_ext.meta import registrations
registrations.postpone()
import torch
assert 'torch._decomp' not in sys.modules
"""

NEEDS = {
    "a name": "torch._meta_registrations.meta_index_select",
    "an import of a name": "from torch._meta_registrations import meta_index_select",
    "decompositions": "from torch._decomp import decomposition_table; assert decomposition_table",
    "references": "import torch._refs.nn.functional; assert torch._refs.nn.functional.relu",
    "what meets them half done": "from torch.utils._content_store import ContentStoreReader",
    "compiler": "assert torch.compile(torch.sin, backend='eager')(torch.zeros(2)).tolist() == [0, 0]",
    "a function that lacks a kernel": (
        "x = torch.ones(3, device='meta')\n"
        "assert registrations.asking_again(torch.logcumsumexp, x, 0).shape == (3,)\n"
        "assert not registrations.load()"
    ),
    "fake tensors": (
        "from torch._subclasses.fake_tensor import FakeTensorMode\n"
        "with FakeTensorMode():\n"
        "    x = torch.nn.functional.embedding(torch.zeros(2, dtype=torch.int64), torch.ones(3, 4))\n"
        "assert x.shape == (2, 4)"
    ),
}


def run(code: str) -> None:
    run_command(sys.executable, "-c", code)


@pytest.mark.slow
@pytest.mark.parametrize("need", NEEDS.values(), ids=NEEDS)
def test_whoever_needs_them_gets_them(need):
    run(f"{START}{need}\nassert torch._meta_registrations.meta_index_select and 'torch._refs' in sys.modules")


@pytest.mark.slow
def test_names_that_there_are_not_are_missing():
    run(
        f"{START}assert getattr(torch._meta_registrations, '__wrapped__', None) is None\n"
        "assert 'torch._decomp' not in sys.modules\n"
        "assert not hasattr(torch._meta_registrations, 'nothing')\n"
        "registrations.postpone()\n"
        "assert torch._meta_registrations.aten is torch.ops.aten"
    )


@pytest.mark.slow
def test_a_command_that_is_called_from_python_leaves_torch_whole():
    run(
        "from litgpt_moe_ext.cli.main import main\n"
        "assert main(['schedule', 'missing.yaml']) == 2\n"
        "import torch\n"
        "ids = torch.zeros(2, dtype=torch.int64, device='meta')\n"
        "assert torch.nn.Embedding(4, 3, device='meta')(ids).shape == (2, 3)"
    )
