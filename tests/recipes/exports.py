"""Holding the export of a checkpoint that was really trained against the checkpoint."""

from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from litgpt_moe_ext.evaluation.loading import load_model
from litgpt_moe_ext.export.hf.read import import_checkpoint
from litgpt_moe_ext.export.hf.write import export_checkpoint
from tests.export.hf.transformers5 import PROMPT, expect


def check_export(checkpoint: Path, folder: Path) -> str:
    """Compare logits, 64 greedy tokens, and what comes back of a class; return the class's name.

    In `folder`, export and expectation stay as `tests.export.hf.transformers5.compare` takes them.
    """
    export = export_checkpoint(checkpoint, folder / "out", dtype="float32")
    ours = load_model(checkpoint, torch.device("cpu"), torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(folder / "out", trust_remote_code=True).eval()
    size, length = ours.config.vocab_size, ours.config.block_size
    tokens = torch.randint(size, (2, length), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        expected = ours(tokens)
        error = (theirs(tokens).logits - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, error
        text, new = tokens[:1, :PROMPT], 64
        written = theirs.generate(text, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
        for _ in range(new):
            text = torch.cat([text, ours(text)[:, -1:].argmax(-1)], dim=1)
    assert written.tolist() == text.tolist()
    expect(folder, tokens, expected, text)
    assert AutoTokenizer.from_pretrained(folder / "out")("some text").input_ids
    card = (folder / "out" / "README.md").read_text(encoding="utf-8")
    for fact in ("training loss", "validation loss", "FLOPs of the training", "hash of the data"):
        assert f"| {fact} | " in card, card
    assert "litgpt-moe train --config hyperparameters.yaml" in card
    assert yaml.safe_load((folder / "out" / "hyperparameters.yaml").read_text())["train"]
    if not export.class_name.startswith("LitGPT"):
        import_checkpoint(folder / "out", folder / "back")
        back = torch.load(folder / "back" / "lit_model.pth", weights_only=True)
        for name, tensor in ours.state_dict().items():
            if name.endswith("correction_bias") and ours.config.n_expert_groups:
                torch.testing.assert_close(back[name] - back[name].min(), tensor - tensor.min(), rtol=0, atol=1e-6)
            elif name in back:
                assert torch.equal(back[name], tensor), name
    return export.class_name
