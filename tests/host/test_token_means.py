"""LitGPT's own commands: a step is a mean over its tokens, however it is cut into micro-batches and over ranks."""

import json
import os
from pathlib import Path
from unittest.mock import patch

import lightning as L
import litgpt.finetune.full
import litgpt.pretrain
import pytest
import torch
from lightning.fabric.strategies import DDPStrategy
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data import JSON
from litgpt.utils import CycleIterator, save_config

from litgpt_moe_ext.data import TextCorpus
from litgpt_moe_ext.data.tokenizer.bpe import BPESettings, train_bpe
from tests.models import initialized_model, moe_config, randomize
from tests.runs import weights_of
from tests.training.processes import in_ranks

ROWS = 16
EXACT = {"rtol": 1e-5, "atol": 1e-6}  # Fabric hands logits on in float32
LOSSES = {"router_z_loss_coef": 0.3, "router_sequence_balancing_loss_coef": 0.3}


class Recorder(L.Fabric):
    """A Fabric that keeps what is logged."""

    def log_dict(self, metrics, step=None):
        vars(self).setdefault("logged", []).append({name: float(value) for name, value in metrics.items()})


def fabric_of(world):
    if world == 1:
        return Recorder(devices=1, accelerator="cpu", precision="64-true")
    os.environ["LOCAL_RANK"] = str(torch.distributed.get_rank())
    strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=True)
    fabric = Recorder(devices=world, accelerator="cpu", precision="64-true", strategy=strategy)
    fabric.launch()
    return fabric


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model to finetune, and questions and answers of very different lengths, of which one batch has no target."""
    folder = tmp_path_factory.mktemp("checkpoint")
    train_bpe(["a question and its answer"] * 9, BPESettings(300), folder)
    config = moe_config(vocab_size=300, padded_vocab_size=320, block_size=512, norm_class_name="LayerNorm", **LOSSES)
    save_config(config, folder)
    torch.manual_seed(0)
    torch.save({"model": randomize(initialized_model(config), 0.2).state_dict()}, folder / "lit_model.pth")
    for name, number in (("train", ROWS), ("val", 4)):
        samples = [{"instruction": "q" * (i * i % 23), "output": "a" * (i % 9 * 4)} for i in range(number)]
        (folder / f"{name}.json").write_text(json.dumps(samples))
    return folder


def finetune(folder: Path, micro_batch_size: int, world: int = 1, **changes):
    """Return the losses that two steps log, those of the validation, and the weights."""
    fabric = fabric_of(world)
    settings = {"max_seq_length": 190, "epochs": 2, "save_interval": None, "lr_warmup_steps": 1, **changes}
    train = TrainArgs(global_batch_size=ROWS, micro_batch_size=micro_batch_size, log_interval=1, **settings)
    config = litgpt.finetune.full.Config.from_file(folder / "model_config.yaml")
    data = JSON(folder, mask_prompt=True, num_workers=0)
    (out_dir := folder / f"out-{micro_batch_size}-{world}").mkdir(exist_ok=True)
    evaluation = EvalArgs(interval=2, initial_validation=False, max_iters=10, max_new_tokens=1)
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.3}}
    with patch.object(litgpt.finetune.full, "save_hyperparameters", lambda *_: None):  # of the command line
        litgpt.finetune.full.main(fabric, world, False, 1, config, data, folder, out_dir, train, evaluation, optimizer)
    accumulation = train.gradient_accumulation_iters(world)
    steps = [line["loss"] for line in fabric.logged if "loss" in line and line["iter"] % accumulation == 0]
    validations = [line["val_loss"] for line in fabric.logged if "val_loss" in line]
    weights = weights_of(out_dir / "final") if world == 1 else {}
    return steps, validations, weights


def test_finetuning_one_by_sixteen_and_sixteen_by_one(checkpoint):
    """Prompts have no targets, but routers see them: the means of auxiliary losses are over other tokens."""
    one, sixteen = finetune(checkpoint, 1), finetune(checkpoint, ROWS)
    assert len(one[0]) == len(one[1]) == 2
    torch.testing.assert_close(one, sixteen, **EXACT)
    assert litgpt.finetune.full.CycleIterator is CycleIterator


@pytest.mark.slow
def test_finetuning_on_two_processes(checkpoint):
    one, two = finetune(checkpoint, ROWS), in_ranks(finetune, 2, checkpoint, 1, 2)
    for losses, validations, _ in two:
        torch.testing.assert_close(losses, one[0], **EXACT)
        torch.testing.assert_close(validations[-1:], one[1][-1:], **EXACT)


def test_epochs_end_where_litgpt_ends_them(checkpoint):
    """Steps are fetched whole; one that the last epoch cannot fill is not begun, as without the plugin."""
    losses, _, _ = finetune(checkpoint, 3)
    assert len(losses) == 2  # 6 micro-batches an epoch, 5 a step


def test_pretraining_with_padded_data(tmp_path, monkeypatch):
    """`litgpt pretrain` itself, without the training loop of this package."""
    monkeypatch.setattr(litgpt.pretrain, "save_hyperparameters", lambda *_: None)  # of the command line
    (tmp_path / "source.txt").write_text("\n".join("word " * (i * i % 29 + 1) for i in range(120)))
    config = moe_config(vocab_size=270, padded_vocab_size=270, **LOSSES)
    results = []
    for micro_batch_size in (1, 8):
        fabric, out_dir = fabric_of(1), tmp_path / str(micro_batch_size)
        data = TextCorpus(
            data_path=tmp_path / "data", source_path=tmp_path / "source.txt", separator="\n",
            bpe=BPESettings(270), val_fraction=0.2, packing="pad",
        )  # fmt: skip
        train = TrainArgs(
            global_batch_size=8, micro_batch_size=micro_batch_size, max_tokens=2 * 8 * 32, max_seq_length=32,
            log_interval=1, save_interval=None, max_norm=9.0, tie_embeddings=False,
            lr_warmup_steps=0, min_lr=0.3,  # LitGPT's schedule goes by micro-batches
        )  # fmt: skip
        litgpt.pretrain.main(
            fabric=fabric, devices=1, seed=1, initial_checkpoint_dir=None, resume=False, config=config, data=data,
            out_dir=out_dir, tokenizer_dir=None, tokenizer=None, train=train,
            eval=EvalArgs(interval=2, max_iters=100, initial_validation=False),
            optimizer={"class_path": "torch.optim.SGD", "init_args": {"lr": 0.3}},
        )  # fmt: skip
        model = weights_of(out_dir / "final")
        names = ("loss", "padding", "val_loss")
        results.append(([line[name] for line in fabric.logged for name in names if name in line], model))
    torch.testing.assert_close(*results, **EXACT)
    assert len(results[0][0]) >= 5
