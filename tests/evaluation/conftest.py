"""Checkpoints of a few thousand parameters, with a tokenizer trained on the spot and local tasks."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from litgpt import GPT, Config
from litgpt.utils import save_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.models import dense_config, moe_config, randomize

END_OF_TEXT = "<|endoftext|>"
CORPUS = ["the quick brown fox jumps over the lazy dog", "is it so? yes or no: yes", "is it so? yes or no: no"]
VOCABULARY_SIZE = 320
YES_OR_NO = """
task: yes_or_no
dataset_path: json
dataset_kwargs:
  data_files:
    test: data/questions.json
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: [" yes", " no"]
doc_to_target: answer
metric_list:
  - metric: acc
"""


def write_tokenizer(folder: Path) -> Tokenizer:
    """Train a byte-level tokenizer and save it in the files that LitGPT and Hugging Face read."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 10, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer


def write_checkpoint(folder: Path, config: Config, model: GPT | None = None) -> GPT:
    """Save a model, by default one with random weights, as `litgpt pretrain` would."""
    model = randomize(GPT(config), std=0.3) if model is None else model
    write_tokenizer(folder)
    save_config(config, folder)
    torch.save(model.state_dict(), folder / "lit_model.pth")
    return model.eval()


def llama_config(**changes) -> Config:
    """Return a configuration without any of the plugin's classes."""
    return dense_config(**{"vocab_size": VOCABULARY_SIZE, "padded_vocab_size": VOCABULARY_SIZE, **changes})


def yes_saying_model(config: Config, tokenizer: Tokenizer) -> GPT:
    """Return a model that finds " yes" more probable than " no" whatever it reads."""
    model = randomize(GPT(config))
    model.lm_head.weight.data.zero_()
    model.lm_head.bias.data.zero_()
    (yes,) = tokenizer.encode(" yes").ids
    model.lm_head.bias.data[yes] = 3.0
    return model


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory) -> Path:
    """A plain LitGPT checkpoint; its greedy continuations vary."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("llama")
    write_checkpoint(folder, llama_config())
    return folder


@pytest.fixture(scope="session")
def moe_dir(tmp_path_factory) -> Path:
    """A checkpoint with `SharedExpertMoE` that answers every question with " yes"."""
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("moe")
    config = moe_config(
        n_shared_expert=1, vocab_size=VOCABULARY_SIZE, padded_vocab_size=VOCABULARY_SIZE, lm_head_bias=True
    )
    write_checkpoint(folder, config, yes_saying_model(config, write_tokenizer(folder)))
    return folder


@pytest.fixture
def task_file(tmp_path, monkeypatch) -> Path:
    """A task whose four questions have " yes" as the right answer three times; its data lies beside it."""
    # `datasets` would otherwise cache the file in the home directory.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    (folder / "data").mkdir(parents=True)
    questions = [{"question": f"is it so? {i}", "answer": int(i == 2)} for i in range(4)]
    (folder / "data" / "questions.json").write_text("\n".join(json.dumps(question) for question in questions))
    path = folder / "yes_or_no.yaml"
    path.write_text(YES_OR_NO)
    return path
