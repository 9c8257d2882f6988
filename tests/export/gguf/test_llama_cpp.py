"""llama.cpp itself computes what the original computes: `pip install llama-cpp-python`, `pytest -m llama_cpp`.

Keys and values are kept in float32 for it; its GELU is a table of float16.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from litgpt_moe_ext.data.tokenizer.bpe import BPESettings, train_bpe
from litgpt_moe_ext.evaluation.loading import load_model
from litgpt_moe_ext.export.gguf.write import export_gguf
from tests.export.gguf.models import GRAPH_CASES
from tests.export.gguf.tokenizers import PRE_TOKENIZERS, train_spm
from tests.export.gguf.tokenizers import TEXT as TOKENIZED
from tests.export.gguf.tokenizers import train_bpe as train_bpe_like
from tests.export.hf.models import make_checkpoint

pytestmark = pytest.mark.llama_cpp
TEXT = "def reverse(items):\n    return items[::-1]  # 12345 it's déjà-vu 日本\n\n\tdone"


def open_file(folder: Path):
    llama_cpp = pytest.importorskip("llama_cpp")
    exact = {"n_ctx": 96, "logits_all": True, "n_threads": 1, "flash_attn": False, "type_k": 0, "type_v": 0}
    return llama_cpp.Llama(str(folder / "model.gguf"), verbose=False, **exact)


def greedy(llama, prompt: list[int], n: int) -> list[int]:
    llama.reset()
    llama.eval(prompt)
    text = list(prompt)
    for _ in range(n):
        text.append(int(np.argmax(llama.scores[len(text) - 1])))
        llama.eval(text[-1:])
    return text


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", GRAPH_CASES)
def test_logits_and_tokens(tmp_path, name, tied):
    graph, settings, biased = GRAPH_CASES[name]
    settings = {**settings, "vocab_size": 320, "padded_vocab_size": 320}
    model = make_checkpoint(tmp_path / "checkpoint", settings, biased, tied)
    tokenizer = train_bpe([TEXT] * 20, BPESettings(vocab_size=320), tmp_path / "checkpoint")
    export_gguf(tmp_path / "checkpoint", tmp_path / "out")
    llama = open_file(tmp_path / "out")
    assert llama.tokenize(TEXT.encode(), add_bos=False) == tokenizer.encode(TEXT).ids
    tokens = torch.randint(320, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(tokens)[0]
        text = tokens[:, :8]
        for _ in range(64):
            text = torch.cat([text, model(text)[:, -1:].argmax(-1)], dim=1)
    llama.eval(tokens[0].tolist())
    error = np.abs(llama.scores[:40] - expected.numpy()).max() / expected.abs().max().item()
    print(f"{name}: logits within {error:.1e}")
    assert error < (5e-3 if graph == "gpt2" else 5e-5)
    assert greedy(llama, tokens[0, :8].tolist(), 64) == text[0].tolist()


@pytest.mark.parametrize("name", [*PRE_TOKENIZERS, "spm"])
def test_tokenizers(tmp_path, name):
    """Of a text with digits, accents, signs, several scripts and spaces of all kinds."""
    settings = {**GRAPH_CASES["llama-yarn"][1], "vocab_size": 420, "padded_vocab_size": 420}
    make_checkpoint(tmp_path / "checkpoint", settings, False)
    if name == "spm":
        expected = train_spm(tmp_path / "checkpoint").encode(TOKENIZED)
    else:
        expected = train_bpe_like(tmp_path / "checkpoint", name, 420).encode(TOKENIZED).ids
    export_gguf(tmp_path / "checkpoint", tmp_path / "out")
    llama_cpp = pytest.importorskip("llama_cpp")
    llama = llama_cpp.Llama(str(tmp_path / "out" / "model.gguf"), vocab_only=True, verbose=False)
    assert llama.tokenize(TOKENIZED.encode(), add_bos=False) == expected


def test_a_trained_checkpoint(tmp_path):
    """The one that the environment variable TRAINED_CHECKPOINT names."""
    checkpoint = os.environ.get("TRAINED_CHECKPOINT")
    if checkpoint is None:
        # Training one takes minutes; random models above compare every tensor already.
        pytest.skip("set TRAINED_CHECKPOINT to a checkpoint of a run to compare its text as well")
    export_gguf(Path(checkpoint), tmp_path / "out", dtype="float32")
    llama = open_file(tmp_path / "out")
    model = load_model(Path(checkpoint), torch.device("cpu"), torch.float32)
    prompt = llama.tokenize(b"def parse(", add_bos=False)
    text = torch.tensor([prompt])
    with torch.inference_mode():
        for _ in range(48):
            text = torch.cat([text, model(text)[:, -1:].argmax(-1)], dim=1)
    assert greedy(llama, prompt, 48) == text[0].tolist()
