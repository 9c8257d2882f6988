"""Exports open in transformers 5, which does not fit into LitGPT's environment, and what it opens imports."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from litgpt import GPT

from litgpt_moe_ext.export.hf.read import import_checkpoint
from litgpt_moe_ext.export.hf.write import export_checkpoint
from tests.export.hf.models import CASES, make_checkpoint
from tests.export.hf.quantized import GPT_OSS_FOR_MXFP4, to_fp8, to_mxfp4

SCRIPT = Path(__file__).with_name("compare_with_transformers.py")


@pytest.mark.slow
def test_logits_and_tokens_in_another_environment(tmp_path):
    cases = tmp_path / "cases"
    for name, (_, settings, biased) in CASES.items():
        model = make_checkpoint(tmp_path / "checkpoints" / name, settings, biased)
        export_checkpoint(tmp_path / "checkpoints" / name, cases / name / "out")
        expect(model, cases / name)
    for name, changes, quantize in (
        ("gpt-oss", GPT_OSS_FOR_MXFP4, to_mxfp4),
        ("deepseek-v3", {}, lambda folder: to_fp8(folder, (4, 4))),
    ):
        _, settings, biased = CASES[name]
        checkpoint, case = tmp_path / "checkpoints" / f"{name}-quantized", cases / f"{name}-quantized"
        make_checkpoint(checkpoint, {**settings, **changes}, biased)
        export_checkpoint(checkpoint, case / "out")
        quantize(case / "out")
        config = import_checkpoint(case / "out", checkpoint / "back").config
        model = GPT(config).eval()
        model.load_state_dict(torch.load(checkpoint / "back" / "lit_model.pth", weights_only=True))
        expect(model, case)
    uv = [shutil.which("uv")] if shutil.which("uv") else [sys.executable, "-m", "uv"]
    command = [*uv, "run", "--isolated", "--no-project"]
    for package in ("transformers==5.24.0", "torch==2.15.0", "accelerate"):  # which quantized models ask for
        command += ["--with", package]
    result = subprocess.run(
        [*command, "python", str(SCRIPT), str(cases)], capture_output=True, text=True, timeout=900, cwd=tmp_path
    )
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert "transformers 5.24.0" in result.stdout
    assert result.stdout.count("logits within") == len(CASES) + 2


def expect(model: GPT, case: Path) -> None:
    """Save logits and 64 greedily written tokens for the other environment."""
    tokens = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(1))
    text = tokens[:1, :8]
    with torch.inference_mode():
        logits = model(tokens)
        for _ in range(64):
            text = torch.cat([text, model(text)[:, -1:].argmax(-1)], dim=1)
    torch.save({"tokens": tokens, "logits": logits, "text": text, "prompt": 8}, case / "expected.pt")
