"""LitGPT's own finetuning of all weights trains the plugin's checkpoints on, and moves the balancing bias."""

import json
import sys
from pathlib import Path

import pytest
import torch

from litgpt_moe_ext.data.tokenizer.bpe import BPESettings, train_bpe
from tests.models import initialized_model, moe_config, noisy_config
from tests.runs import run_command, weights_of


@pytest.mark.slow
@pytest.mark.parametrize("make", [moe_config, noisy_config])
def test_finetune_full(make, tmp_path):
    from litgpt.utils import save_config

    checkpoint = tmp_path / "checkpoint"
    train_bpe(["a question and its answer"] * 9, BPESettings(300), checkpoint)
    config = make(
        vocab_size=300, padded_vocab_size=320, block_size=256, attention_class_name="SinkAttention", n_shared_expert=1
    )
    save_config(config, checkpoint)
    model = initialized_model(config)
    torch.save({"model": model.state_dict()}, checkpoint / "lit_model.pth")
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"instruction": f"question {i}", "output": f"answer {i}"} for i in range(16)]))

    out_dir = tmp_path / "out"
    run_command(
        *(Path(sys.executable).parent / "litgpt", "finetune_full", checkpoint, "--data", "JSON"),
        *("--data.json_path", data, "--data.val_split_fraction", "0.25", "--train.global_batch_size", "4"),
        *("--train.micro_batch_size", "2", "--train.max_steps", "3", "--train.epochs", "1", "--out_dir", out_dir),
        *("--eval.final_validation", "false", "--eval.initial_validation", "false", "--precision", "32-true"),
        cwd=tmp_path,
        OMP_NUM_THREADS="1",
    )
    before = model.state_dict()
    after = weights_of(out_dir / "final")
    for name in ("mlp.experts.gate_up_proj", "mlp.gate.weight", "attn.sinks", "mlp.shared_experts.proj.weight"):
        key = f"transformer.h.1.{name}"
        assert not torch.equal(after[key], before[key]), key
    if make is moe_config:
        assert after["transformer.h.1.mlp.gate.e_score_correction_bias"].abs().max() > 0.0005
