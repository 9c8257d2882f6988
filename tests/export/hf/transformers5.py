"""Comparing exports in transformers 5, which does not fit into LitGPT's environment."""

import shutil
import subprocess
import sys
from pathlib import Path

import torch
from litgpt import GPT
from torch import Tensor

from litgpt_moe_ext.export.hf.read import import_checkpoint

SCRIPT = Path(__file__).with_name("compare_with_transformers.py")
PROMPT = 8


def expect(case: Path, tokens: Tensor, logits: Tensor, text: Tensor, **more: str) -> None:
    """Save what the other environment must find for the export in `case/out`.

    Args:
        case: Folder of the case.
        tokens: (B, T).
        logits: Of these tokens, (B, T, vocabulary).
        text: A prompt of `PROMPT` tokens and what was greedily written after it, (1, tokens).
        more: What else it must know.
    """
    torch.save({"tokens": tokens, "logits": logits, "text": text, "prompt": PROMPT, **more}, case / "expected.pt")


def expect_of(model: GPT, case: Path, **more: str) -> None:
    """Save logits, and 64 greedily written tokens, of a model with 97 tokens; see `expect`."""
    tokens = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(1))
    text = tokens[:1, :PROMPT]
    with torch.inference_mode():
        logits = model(tokens)
        for _ in range(64):
            text = torch.cat([text, model(text)[:, -1:].argmax(-1)], dim=1)
    expect(case, tokens, logits, text, **more)


def compare(cases: Path) -> None:
    """Compare every case of a folder in an environment of its own, and import what was saved there."""
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
    for saved in cases.glob("*/saved"):
        config = import_checkpoint(saved, saved.with_name("back of it")).config
        model = GPT(config).eval()
        model.load_state_dict(torch.load(saved.with_name("back of it") / "lit_model.pth", weights_only=True))
        expected = torch.load(saved.with_name("expected.pt"))
        with torch.inference_mode():
            error = (model(expected["tokens"]) - expected["logits"]).abs().max() / expected["logits"].abs().max()
        assert error < 1e-5, f"{saved.parent.name}: logits differ by {error:.1e}"
