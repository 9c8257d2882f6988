"""Opens exported models with the transformers of this environment: `python compare_with_transformers.py FOLDER`.

Each folder in FOLDER has an export in `out` and, in `expected.pt`, tokens, logits and greedily written text. What is
not quantized is saved in `saved`. Needs torch and transformers only, so that it runs in an environment with another
version.
"""

import sys
from pathlib import Path

import torch
import transformers


def check_cache(model: torch.nn.Module, tokens: torch.Tensor) -> None:
    """Compare our own code with itself, continued with a cache by either of its names, in training mode too."""
    whole = model(tokens).last_hidden_state
    for name in ("cache", "past_key_values"):
        cache = model(tokens[:, :9])[1]
        rest = model(tokens[:, 9:], **{name: cache}).last_hidden_state
        torch.testing.assert_close(rest, whole[:, 9:], rtol=1e-4, atol=1e-4)
        model.train().gradient_checkpointing_enable()
    model.eval()


def main(folder: Path) -> None:
    """Compare every export, and print the version."""
    for case in sorted(folder.iterdir()):
        expected = torch.load(case / "expected.pt")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            case / "out", trust_remote_code=True, dtype=torch.float32
        ).eval()
        tokens, logits, text = expected["tokens"], expected["logits"], expected["text"]
        with torch.inference_mode():
            error = (model(tokens).logits - logits).abs().max().item() / logits.abs().max().item()
            prompt = text[:, : expected["prompt"]]
            written = model.generate(
                prompt, max_new_tokens=text.size(1) - prompt.size(1), do_sample=False, eos_token_id=None, pad_token_id=0
            )
            if model.config.model_type == "litgpt_moe":
                check_cache(model.model, tokens)
        assert error < 1e-5, f"{case.name}: logits differ by {error:.1e}"
        assert written.tolist() == text.tolist(), f"{case.name}: wrote other tokens"
        if getattr(model.config, "quantization_config", None) is None:
            model.save_pretrained(case / "saved")
        print(f"{case.name}: {type(model).__name__}, logits within {error:.0e}")
    print(f"transformers {transformers.__version__}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
