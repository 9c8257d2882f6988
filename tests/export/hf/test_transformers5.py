"""Exports open in transformers 5, which does not fit into LitGPT's environment."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from litgpt_moe_ext.export.hf.write import export_checkpoint
from tests.export.hf.models import CASES, make_checkpoint

SCRIPT = Path(__file__).with_name("compare_with_transformers.py")


@pytest.mark.slow
def test_logits_and_tokens_in_another_environment(tmp_path):
    for name, (_, settings, biased) in CASES.items():
        model = make_checkpoint(tmp_path / "checkpoints" / name, settings, biased)
        folder = tmp_path / "cases" / name
        export_checkpoint(tmp_path / "checkpoints" / name, folder / "out")
        tokens = torch.randint(settings["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(1))
        text = tokens[:1, :8]
        with torch.inference_mode():
            logits = model(tokens)
            for _ in range(32):
                text = torch.cat([text, model(text)[:, -1:].argmax(-1)], dim=1)
        torch.save({"tokens": tokens, "logits": logits, "text": text, "prompt": 8}, folder / "expected.pt")
    uv = [shutil.which("uv")] if shutil.which("uv") else [sys.executable, "-m", "uv"]
    command = [*uv, "run", "--isolated", "--no-project", "--with", "transformers==5.24.0", "--with", "torch==2.15.0"]
    result = subprocess.run(
        [*command, "python", str(SCRIPT), str(tmp_path / "cases")],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert "transformers 5.24.0" in result.stdout
    assert result.stdout.count("logits within") == len(CASES)
