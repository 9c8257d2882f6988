"""The notebook looks at its model wherever LitGPT has put it."""

import sys

import pytest

from tests import null_gpu
from tests.docs.test_notebook import cells
from tests.runs import ROOT, run_command


@pytest.mark.slow
def test_the_notebook_on_a_gpu(gpu, finished, tmp_path):
    """From the model that is trained on; kernels do nothing here, so all that is seen is where tensors are."""
    finished(tmp_path / "final")
    first = f"from pathlib import Path\nROOT, OUT = Path({str(ROOT)!r}), Path({str(tmp_path / 'final')!r})"
    program = "\n".join([first, *(cell.source for cell in cells()[2:]), "assert llm.fabric.device.type == 'cuda'"])
    program = program.replace("max_new_tokens=40", "max_new_tokens=8").replace("[:256]", "[:32]")  # it reads 32
    # 8.0: on newer cards attention would be cuDNN's.
    run_command(sys.executable, "-c", program, MPLBACKEND="agg", **null_gpu.environment(gpu, 80))
