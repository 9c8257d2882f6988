"""Opens exported models with the vLLM of this environment: `python compare_with_vllm.py FOLDER`.

Each folder in FOLDER has an export in `out` and, in `expected.pt`, tokens, logits, greedily written text, and the
options of `vllm serve` that the export names. Needs vLLM only, as its torch is another one.
"""

import gc
import os
import sys
from pathlib import Path

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

import torch
import vllm
from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory


def compare(case: Path, compiled: bool) -> None:
    """Compare the log-probabilities of every token after every prefix, and text.

    Args:
        case: Folder of the case.
        compiled: Whether vLLM compiles the model, as `vllm serve` does, which takes a minute.
    """
    expected = torch.load(case / "expected.pt")
    tokens, logits, text, options = (expected[name] for name in ("tokens", "logits", "text", "options"))
    llm = LLM(
        str(case / "out"),
        dtype="float32",
        trust_remote_code="--trust-remote-code" in options,
        model_impl="transformers" if "transformers" in options else "auto",
        enforce_eager=not compiled,
        skip_tokenizer_init=True,
        max_model_len=96,
        max_num_batched_tokens=96,
        max_logprobs=logits.size(-1),
    )
    prompt = text[0, : expected["prompt"]].tolist()
    greedy = SamplingParams(temperature=0, max_tokens=text.size(1) - len(prompt), ignore_eos=True, detokenize=False)
    (written,) = llm.generate({"prompt_token_ids": prompt}, greedy, use_tqdm=False)
    scoring = SamplingParams(max_tokens=1, prompt_logprobs=logits.size(-1), detokenize=False)
    error = 0.0
    for row, row_logits in zip(tokens, logits.log_softmax(-1), strict=True):
        (scored,) = llm.generate({"prompt_token_ids": row.tolist()}, scoring, use_tqdm=False)
        for t, found in enumerate(scored.prompt_logprobs[1:]):
            error = max(error, *(abs(entry.logprob - row_logits[t, id].item()) for id, entry in found.items()))
    assert error < 2e-3, f"{case.name}: log-probabilities differ by {error:.1e}"
    assert prompt + list(written.outputs[0].token_ids) == text[0].tolist(), f"{case.name}: wrote other tokens"
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    print(f"{case.name}{options}: {type(model).__name__}, log-probabilities within {error:.0e}", flush=True)


def main(folder: Path, compiled: bool) -> None:
    """Compare every export, and print the version."""
    for case in sorted(folder.iterdir()):
        compare(case, compiled)
        gc.collect()
        cleanup_dist_env_and_memory()
    print(f"vllm {vllm.__version__}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--compiled" in sys.argv)
