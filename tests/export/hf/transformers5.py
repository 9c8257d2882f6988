"""Comparing exports in transformers 5, which does not fit into LitGPT's environment."""

import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

SCRIPT = Path(__file__).with_name("compare_with_transformers.py")
PROMPT = 8


def expect(case: Path, tokens: Tensor, logits: Tensor, text: Tensor) -> None:
    """Save what the other environment must find for the export in `case/out`.

    Args:
        case: Folder of the case.
        tokens: (B, T).
        logits: Of these tokens, (B, T, vocabulary).
        text: A prompt of `PROMPT` tokens and what was greedily written after it, (1, tokens).
    """
    torch.save({"tokens": tokens, "logits": logits, "text": text, "prompt": PROMPT}, case / "expected.pt")


def compare(cases: Path) -> None:
    """Compare every case of a folder in an environment of its own."""
    uv = [shutil.which("uv")] if shutil.which("uv") else [sys.executable, "-m", "uv"]
    command = [*uv, "run", "--isolated", "--no-project"]
    for package in ("transformers==5.24.0", "torch==2.15.0", "accelerate"):  # which quantized models ask for
        command += ["--with", package]
    result = subprocess.run(
        [*command, "python", str(SCRIPT), str(cases)], capture_output=True, text=True, timeout=900, cwd=cases
    )
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert "transformers 5.24.0" in result.stdout
    assert result.stdout.count("logits within") == len(list(cases.iterdir()))
