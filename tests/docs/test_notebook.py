"""The notebook runs from top to bottom, from the folder that Jupyter starts it in, and says what goes wrong."""

import shutil
import subprocess
import sys

import nbformat
import pytest
from nbclient import NotebookClient

from tests.docs.pages import ROOT
from tests.runs import PATIENCE

NOTEBOOK = ROOT / "examples" / "first_model.ipynb"


def cells():
    return [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]


def run_first_cells(count, folder):
    code = "\n".join(cell.source for cell in cells()[:count])
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=PATIENCE)


def test_outputs_are_not_committed():
    assert all(not cell.outputs for cell in cells())


def test_a_folder_that_is_no_clone(tmp_path):
    assert run_first_cells(1, tmp_path).stderr.endswith("is not in a clone of the repository; start Jupyter there\n")


def test_what_a_failed_training_said_is_shown(tmp_path):
    (tmp_path / "run_train.py").write_text("import sys\nsys.exit('error: no room')")
    ended = run_first_cells(2, tmp_path)
    assert ended.stdout == "error: no room\n"
    assert ended.stderr.endswith("AssertionError: the training has failed; its last lines say why\n")


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    root = tmp_path / "my clone"
    for name in ("configs", "run_train.py"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, root / name)
    (root / "examples").mkdir()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    limits = {"timeout": PATIENCE, "startup_timeout": PATIENCE}
    NotebookClient(notebook, resources={"metadata": {"path": str(root / "examples")}}, **limits).execute()
    text = str(notebook.cells)
    assert "image/png" in text
    assert "MaxVio" in text
    # Where the project's .gitignore leaves it out.
    assert not list((root / "examples").iterdir())
    assert (root / "checkpoints" / "notebook" / "final").is_dir()
