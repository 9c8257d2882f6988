"""The tree of settings: documented, LitGPT's names among them, and checked however it is made."""

import dataclasses
import inspect
import sys

import litgpt.args
import litgpt.pretrain
import litgpt.types
import pytest

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.training.phases.checks import check_settings
from litgpt_moe_ext.training.settings import (
    DistributedArgs,
    EvalArgs,
    LogArgs,
    Settings,
    TrainArgs,
    field_table,
)
from tests.models import attention_config
from tests.runs import run_command


def test_every_setting_has_a_row_with_a_docstring():
    rows = {row.name: row for row in field_table(Settings)}
    assert len(rows) == len(list(field_table(Settings)))
    assert all(row.doc.endswith(".") for row in rows.values()), [n for n, r in rows.items() if not r.doc.endswith(".")]
    assert rows["train.max_tokens"].doc == "Total number of tokens to train on, padding included."
    assert rows["train.max_tokens"].default == 3_000_000_000_000
    assert rows["distributed.timeout_minutes"].type is not None


def test_every_setting_of_litgpt_is_there():
    """`litgpt pretrain`'s arguments, and the fields and types of its dataclasses."""
    ours = {field.name for field in dataclasses.fields(Settings)}
    assert set(inspect.signature(litgpt.pretrain.setup).parameters) <= ours
    for mine, theirs in (
        (TrainArgs, litgpt.args.TrainArgs),
        (EvalArgs, litgpt.args.EvalArgs),
        (LogArgs, litgpt.args.LogArgs),
    ):
        assert [f.name for f in dataclasses.fields(mine)] == [f.name for f in dataclasses.fields(theirs)]
    loggers = {field.name: field for field in dataclasses.fields(Settings)}["logger_name"].type
    assert loggers == litgpt.types.LoggerChoice


def test_the_defaults_are_those_of_litgpt_pretrain():
    defaults = {name: p.default for name, p in inspect.signature(litgpt.pretrain.setup).parameters.items()}
    settings = Settings()
    assert settings.train.for_litgpt() == defaults["train"]
    assert settings.eval.for_litgpt() == defaults["eval"]
    assert dataclasses.asdict(settings.log) == dataclasses.asdict(defaults["log"])
    for name in ("out_dir", "precision", "optimizer", "devices", "num_nodes", "seed", "resume"):
        assert getattr(settings, name) == defaults[name]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainArgs(max_norm=0), "train.max_norm: 0 must be a number above 0"),
        (lambda: TrainArgs(max_tokens=None), "train.max_tokens: null must be an integer of at least 1"),
        (lambda: TrainArgs(lr_warmup_fraction=0.1), "train.lr_warmup_fraction: 0.1 must be null beside"),
        (lambda: TrainArgs(save_interval=1.5), "train.save_interval: 1.5 must be an integer of at least 1, or null"),
        (lambda: TrainArgs(log_interval=True), "train.log_interval: True must be an integer of at least 1"),
        (lambda: EvalArgs(max_new_tokens=3), "eval.max_new_tokens: 3 must be null for pretraining"),
        (lambda: DistributedArgs(allgather_bucket_size=3), "distributed.allgather_bucket_size: 3 must be even"),
        (lambda: Settings(precision="16"), "precision: '16' must be one of bf16-true, bf16-mixed, 16-mixed or 32-true"),
        (lambda: Settings(seed=2**32), "seed: 4294967296 must be an integer from 0 to 4294967295"),
        (lambda: Settings(optimizer=None), "optimizer: null must be text or keys and values"),
        (lambda: Settings(devices=0), "devices: 0 must be auto, -1 or an integer of at least 1"),
    ],
)
def test_made_in_python_it_is_checked_as_well(make, message):
    with pytest.raises(SettingsError) as error:
        make()
    assert str(error.value).startswith(message)
    assert error.value.setting == message.partition(":")[0]


def test_a_capped_head_and_a_fused_loss_are_refused_before_anything_starts():
    settings = Settings(fused_cross_entropy=True)
    with pytest.raises(SettingsError, match="^fused_cross_entropy: true cannot be .*final_logit_softcapping: 30.0"):
        check_settings(settings, attention_config(final_logit_softcapping=30.0))


def test_numbers_are_plain():
    """Checkpoints and loggers would not know a type of their own."""
    train = TrainArgs(max_tokens=1e6, min_lr=1)
    assert (type(train.max_tokens), type(train.min_lr)) == (int, float)


def test_importing_the_tree_loads_neither_torch_nor_litgpt():
    code = (
        "import sys, litgpt_moe_ext.training.settings, litgpt_moe_ext.cli.mistakes;"
        "assert not {'torch', 'litgpt', 'lightning'} & set(sys.modules)"
    )
    run_command(sys.executable, "-c", code)
