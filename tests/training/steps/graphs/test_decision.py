"""Runs whose passes are captured and replayed, on a CPU with a stand-in for the graphs, and when they are tried."""

from functools import partial

import pytest
import torch

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.loss.linear import _HalfProducts
from litgpt_moe_ext.training.parallel.facts import facts_of
from litgpt_moe_ext.training.steps import handover
from litgpt_moe_ext.training.steps.graphs.decision import GraphDecision, decide
from litgpt_moe_ext.training.steps.graphs.graphed_loss import GraphOptions
from tests.models import moe_config, needs_fused_loss
from tests.runs import logged, train, weights_of
from tests.training.steps.graphs.passes import Recordings, Reruns


@pytest.fixture
def graphs(monkeypatch):
    """Take graphs that are not there for granted; return what was captured."""
    made = []

    def make_capture():
        made.append(Reruns())
        return made[-1]

    monkeypatch.setattr(handover, "GraphOptions", partial(GraphOptions, make_capture=make_capture))
    monkeypatch.setattr("litgpt_moe_ext.training.phases.equip.decide_graphs", lambda *_: GraphDecision(None, False))
    return made


@pytest.mark.parametrize(
    ("packing", "precision"), [("stream", "32-true"), pytest.param("pad", "bf16-mixed", marks=pytest.mark.slow)]
)
def test_the_run_is_the_same(recipe, graphs, monkeypatch, tmp_path, capsys, packing, precision):
    """With validations, samples, losses, dropout and an interruption."""
    flags = ["--data.init_args.packing", packing]
    file = recipe(
        precision=precision,
        model_config={"router_z_loss_coef": 0.01, "expert_dropout": 0.1},
        sample={"prompts": ["def "], "max_new_tokens": 3},
    )
    graphed, resumed, plain = (tmp_path / name for name in ("graphed", "resumed", "plain"))
    assert train("--config", file, "--out_dir", graphed, *flags) == 0
    assert [(capture.captured, capture.validations) for capture in graphs] == [(2, 1)]
    assert capsys.readouterr().out.count("CUDA graphs: on, from this step") == 1
    assert train("--config", file, "--out_dir", resumed, *flags, "--train.max_steps", 8) == 0
    assert train("--config", file, "--out_dir", resumed, *flags, "--resume", "auto") == 0
    assert len(graphs) == 3
    monkeypatch.undo()
    assert train("--config", file, "--out_dir", plain, *flags) == 0
    for column in ("loss", "val_loss", "grad_norm", "moe/max_vio"):
        expected = logged(plain, column)
        assert expected
        assert logged(graphed, column) == expected
        assert logged(resumed, column) == expected
    for out_dir in (graphed, resumed):
        ours, theirs = weights_of(out_dir / "final"), weights_of(plain / "final")
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@needs_fused_loss
def test_with_the_fused_loss(recipe, graphs, monkeypatch, tmp_path):
    file = recipe()
    assert train("--config", file, "--out_dir", tmp_path / "graphed", "--fused_cross_entropy", "true") == 0
    assert len(graphs) == 1
    monkeypatch.undo()
    assert train("--config", file, "--out_dir", tmp_path / "plain", "--fused_cross_entropy", "true") == 0
    assert logged(tmp_path / "graphed", "loss") == logged(tmp_path / "plain", "loss")


@needs_fused_loss
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true"])
def test_a_recorded_run_is_the_same(recipe, graphs, monkeypatch, tmp_path, capsys, precision):
    """With replays that run no Python: scaler, fused loss as on a GPU, average of the weights, samples, validation."""
    monkeypatch.setattr(f"{__name__}.Reruns", Recordings)
    # An earlier run may have left it, and on a CPU padding is looked for.
    monkeypatch.setattr("litgpt_moe_ext.tokens.padding._accepted", False)
    dtype = torch.float16 if precision == "16-mixed" else torch.bfloat16

    def loss(x, targets, head, _dtype):
        return _HalfProducts.apply(x.flatten(0, 1), head.weight, head.bias, targets.flatten(), dtype)

    monkeypatch.setattr("litgpt_moe_ext.training.callbacks.fused_loss.linear_loss", loss)
    model = {"expert_backend": "grouped_mm", "moe_intermediate_size": 16, "router_z_loss_coef": 0.01}
    extras = {"ema": {"decay": 0.9}, "sample": {"prompts": ["def "], "max_new_tokens": 3}}
    file = recipe(precision=precision, model_config={**model, "expert_dropout": 0.1}, **extras)
    graphed, plain = tmp_path / "graphed", tmp_path / "plain"
    assert train("--config", file, "--out_dir", graphed, "--fused_cross_entropy", "true") == 0
    assert "CUDA graphs: on, from this step" in capsys.readouterr().out
    off = GraphDecision("not now", False)
    monkeypatch.setattr("litgpt_moe_ext.training.phases.equip.decide_graphs", lambda *_: off)
    assert train("--config", file, "--out_dir", plain, "--fused_cross_entropy", "true") == 0
    for column in ("loss", "val_loss", "grad_norm", "moe/max_vio"):
        assert logged(graphed, column) == logged(plain, column)
    for folder in ("final", "final/ema"):
        ours, theirs = weights_of(graphed / folder), weights_of(plain / folder)
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_refused_where_there_is_no_card(recipe, capsys):
    assert train("--config", recipe(), "--cuda_graphs", "true") == 2
    message = "cuda_graphs: true cannot work here (they are for NVIDIA GPUs, this is cpu); set cuda_graphs: auto"
    assert message in capsys.readouterr().err


def on_a_card(compiled=False, processes=1, strategy="auto", **config):
    """Return the conditions of a run on a card."""
    return "cuda", facts_of(strategy), processes, compiled, moe_config(**config)


DOCUMENTS = {
    "attention_class_name": "SinkAttention", "attention_document_boundary": "bos", "attention_document_token_id": 0,
}  # fmt: skip
GLOBAL = {"router_load_balancing_loss_coef": 0.1, "router_load_balancing_loss_scope": "global_batch"}


def test_tried_on_one_card():
    assert decide("auto", *on_a_card()) == GraphDecision(None, False)
    assert decide(True, *on_a_card()) == GraphDecision(None, True)
    for settings in ({"router_load_balancing_loss_coef": 0.1}, GLOBAL, DOCUMENTS):
        assert decide("auto", *on_a_card(**settings)) == GraphDecision(None, False)
    assert str(decide(False, *on_a_card())) == "CUDA graphs: off (as asked)"
    # Also where there is one process.
    assert "DeepSpeed" in decide("auto", *on_a_card(strategy="deepspeed_stage_1")).obstacle


def test_tried_under_ddp_where_asked():
    assert decide(True, *on_a_card(processes=2)) == GraphDecision(None, True)
    assert "exchanged after the backward pass" in decide("auto", *on_a_card(processes=2)).obstacle


def test_not_tried_on_amd(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert decide("auto", *on_a_card()).obstacle.startswith("they are for NVIDIA GPUs, this is AMD's")


@pytest.mark.parametrize(
    ("conditions", "reason"),
    [
        ({"processes": 2, "strategy": "fsdp2"}, "processes that share weights"),
        ({"processes": 2, "strategy": "fsdp", "compiled": True}, "processes that share weights"),
        ({"processes": 2, "compiled": True}, "torch.compile is on"),
        ({"compiled": True}, "torch.compile is on"),
        ({"mlp_class_name": "LLaMAMoE"}, "LLaMAMoE waits"),
        ({"processes": 2, **GLOBAL}, "global_batch"),
    ],
)
def test_not_tried(conditions, reason):
    assert reason in decide("auto", *on_a_card(**conditions)).obstacle
    with pytest.raises(SettingsError, match="cuda_graphs: true cannot work here"):
        decide(True, *on_a_card(**conditions))
