"""The doctor sees what would keep a recipe from running."""

import importlib.metadata
import itertools
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from litgpt_moe_ext.cli.main import main
from litgpt_moe_ext.data.pipeline.shards import write_shard
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.inspect.cost.fit import RUNTIME, Fit, best_fit, find_fits
from litgpt_moe_ext.inspect.cost.layers import shorten
from litgpt_moe_ext.inspect.cost.memory import graph_memory, training_memory
from litgpt_moe_ext.inspect.doctor import computing, places, room
from litgpt_moe_ext.inspect.doctor.computing import graphs
from litgpt_moe_ext.inspect.doctor.examination import examine
from litgpt_moe_ext.inspect.doctor.installation import links, versions
from litgpt_moe_ext.inspect.recipes import load_recipe
from litgpt_moe_ext.model_size import count_parameters
from litgpt_moe_ext.training.parallel.accelerator import accelerator_here
from litgpt_moe_ext.training.phases.inputs import check_writable
from tests.evaluation.conftest import VOCABULARY_SIZE
from tests.models import moe_config, needs_fused_loss
from tests.settings import read_settings, recipe_with
from tests.subsets import soon

MODEL = {"n_layer": 1, "n_embd": 16, "n_head": 2, "block_size": 16, "padded_vocab_size": 320, "vocab_size": 320}
STDLIB = {"class_path": "litgpt_moe_ext.data.PythonStdlib", "init_args": {"vocab_size": 300}}
TWO_STDLIBS = {
    "class_path": "litgpt_moe_ext.data.Mixture",
    "init_args": {"corpora": {"a": STDLIB, "b": STDLIB}, "weights": {"a": 1, "b": 1}},
}


def verdicts(settings: dict) -> dict[str, str]:
    return {finding.topic: finding.verdict for finding in examine(recipe_with(moe_config(), settings))}


def test_a_recipe_that_can_run(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    data = {
        "class_path": "litgpt_moe_ext.data.PythonStdlib",
        "init_args": {"data_path": str(tmp_path / "data"), "vocab_size": 300},
    }
    experts = {"mlp_class_name": "MoE", "n_expert": 2, "n_expert_per_token": 1, "moe_intermediate_size": 8}
    model = {**MODEL, **experts, "norm_topk_prob": True}
    recipe.write_text(yaml.safe_dump({"model_config": model, "out_dir": str(tmp_path / "out"), "data": data}))
    assert main(["doctor", str(recipe)]) == 0
    page = capsys.readouterr().out
    assert "n_expert_per_token: 1 with norm_topk_prob: true makes every gate value 1" in " ".join(page.split())
    for topic in (
        "versions",
        "CPU",
        "compile",
        "experts",
        "attention",
        "precision",
        "strategy",
        "memory",
        "data",
        "disk",
    ):
        assert topic in page
    assert "can run here" in page
    assert not (tmp_path / "out").exists(), "looking changes nothing"


def test_a_litgpt_that_is_not_tested(monkeypatch):
    installed = importlib.metadata.version("litgpt")
    for tested, notes in ((installed, []), ("0.1.0", [f"litgpt {installed} is installed; tested is 0.1.0"])):
        monkeypatch.setattr("litgpt_moe_ext.host.seams.TESTED_LITGPT", tested)
        found = [finding.text.split(":")[0] for finding in versions() if finding.topic == "litgpt"]
        assert found == notes


def test_kernels_are_those_that_a_run_announces():
    config = moe_config(attention_class_name="SinkAttention", attention_sinks=False)
    texts = {finding.topic: finding.text for finding in examine(recipe_with(config, {"precision": "bf16-mixed"}))}
    device = accelerator_here()
    assert texts["experts"].endswith(f" for torch.bfloat16 on {device} (chosen)")
    assert texts["attention"] == f"scaled_dot_product_attention for torch.bfloat16 on {device} (chosen)"


@pytest.mark.parametrize(
    ("settings", "topic"),
    [
        ({"data": {"class_path": "litgpt_moe_ext.data.Nothing"}}, "data"),
        (
            {"data": {"class_path": "litgpt_moe_ext.data.PythonStdlib", "init_args": {"source_path": "/no/such"}}},
            "data",
        ),
        (
            {"data": {"class_path": "litgpt_moe_ext.data.TextCorpus", "init_args": {"tokenizer_dir": "/no/such"}}},
            "data",
        ),
        ({"precision": "64-quantum"}, "precision"),
        ({"strategy": "deepspeed_stage_1", "devices": 2}, "strategy"),
        ({"strategy": "fsdp2", "devices": 2, "distributed": {"bucket_mb": 5}}, "strategy"),
        ({"strategy": "ddp", "distributed": {"cpu_offload": True}}, "strategy"),
    ],
)
def test_problems_are_found(settings, topic):
    assert verdicts(settings)[topic] == "problem"
    assert verdicts({})[topic] != "problem"


@needs_fused_loss
def test_memory_takes_the_whole_recipe_into_account(monkeypatch):
    """What does not fit fits with one of the remedies that are named."""
    config = moe_config(padded_vocab_size=4096, n_layer=6)

    def memory(config=config, **settings):
        findings = examine(recipe_with(config, settings))
        return next(finding for finding in findings if finding.topic == "memory")

    import psutil

    total = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: total._replace(available=8_000_000))
    found = memory(micro_batch_size=8)
    assert found.verdict == "problem"
    assert "lower train.micro_batch_size (4); set activation_checkpointing (none) to full; set fused" in found.text
    assert memory(activation_checkpointing="full", fused_cross_entropy=True).verdict == "good"
    shared = memory(activation_checkpointing="full", fused_cross_entropy=True, devices=4)
    assert shared.verdict == "problem"
    assert "in 4 processes" in shared.text
    config.final_logit_softcapping = 30.0
    assert "set fused" not in memory(config).text


def test_memory_of_gpus(monkeypatch):
    """What is in the CPU's does not count; one GPU's graphs want room as well; several may share a model."""
    config = moe_config(n_layer=1, n_embd=2048)
    for name, value in (("is_available", True), ("current_device", 0), ("device_count", 1), ("mem_get_info", (1, 1))):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr("litgpt_moe_ext.kernels.launch.triton_works_on", lambda device: True)

    def text(**settings):
        found, *_ = room.memory(recipe_with(config, {"precision": "32-true", **settings}))
        assert found.verdict == "problem"
        return found.text

    alone = text()
    assert re.search(r"free; CUDA graphs, where tried, want \d\.\d\d more; lower", alone)
    assert alone.endswith("; share the model among several GPUs with strategy: fsdp2")
    shared = text(strategy="fsdp2", devices=2)
    assert " on each GPU, 0.0 GiB are free; lower" in shared
    assert "fsdp2" not in shared
    held = [
        float(text(strategy="deepspeed_stage_1", devices=2, distributed=args).partition("about ")[2].split()[0])
        for args in ({}, {"offload_optimizer": True})
    ]
    optimizer = 12 * count_parameters(config).total / 2 / 2**30
    assert held[0] - held[1] == pytest.approx(optimizer, abs=0.011)


def test_the_room_in_which_a_model_is_made(monkeypatch):
    """Before it is sharded; stages of ZeRO that do not shard weights hold all of them anyway."""
    config = moe_config(n_layer=1, n_embd=512)
    whole = 4 * count_parameters(config).total
    sizes = {"gpu": whole, "cpu": 2 * whole}
    for name, value in (("is_available", True), ("current_device", 0), ("device_count", 1)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**40, sizes["gpu"]))
    monkeypatch.setattr("litgpt_moe_ext.machine.memory_bytes", lambda: sizes["cpu"])
    monkeypatch.setattr("litgpt_moe_ext.kernels.launch.triton_works_on", lambda device: True)

    def made(strategy):
        recipe = recipe_with(config, {"precision": "bf16-mixed", "strategy": strategy, "devices": 2})
        return [(found.verdict, found.text.partition(", ")[2]) for found in list(room.memory(recipe))[1:]]

    has = f"and a GPU here has {whole / 2**30:.1f}"
    assert made("deepspeed_stage_3") == made("deepspeed_stage_2") == made("ddp") == []
    assert made("fsdp2") == [("good", f"{has}: it is made in the memory of the CPU and sharded from there")]
    sizes["gpu"] -= 1
    remedy = "use fsdp2 over several devices, if need be with distributed.cpu_offload"
    assert made("deepspeed_stage_3") == [
        ("problem", f"{has}, where deepspeed_stage_3 needs it before sharding; {remedy}")
    ]
    sizes["cpu"] -= 1
    ((verdict, text),) = made("fsdp2")
    assert verdict == "problem"
    assert "for each process, where fsdp2 needs it before sharding; start fewer processes on each node" in text


@pytest.mark.parametrize(
    ("settings", "verdict", "text"),
    [
        ({"compile": False}, "good", "tried in the third step"),
        ({"compile": False, "cuda_graphs": False}, "good", "off (as asked)"),
        ({"compile": False, "activation_checkpointing": "full"}, "good", "tried in the third step"),
        ({"compile": False, "devices": 2}, "good", "off (gradients would be exchanged after"),
        ({"compile": False, "devices": 2, "cuda_graphs": True}, "good", "tried in the third step"),
        (
            {"compile": False, "devices": 2, "cuda_graphs": True, "strategy": "fsdp2"},
            "problem",
            "cannot work here (processes that share weights",
        ),
    ],
)
def test_cuda_graphs_are_foretold(monkeypatch, settings, verdict, text):
    monkeypatch.setattr("litgpt_moe_ext.training.compilation.obstacle", lambda device_type: None)
    found = graphs(recipe_with(moe_config(), settings), "cuda")
    assert found.verdict == verdict
    assert text in found.text
    assert "this is cpu" in graphs(recipe_with(moe_config(), {"compile": False}), "cpu").text


def test_memory_of_cuda_graphs_has_the_weights_in_16_bits():
    """Four of six layers are added by calculation; float32 needs no cast."""
    short = shorten(moe_config(n_layer=6))
    for precision, numbers in (("bf16-mixed", 6 * 8 * 3 * 16 * 12), ("32-true", 0)):
        memory = training_memory(short, recipe_with(moe_config(n_layer=6)).step(precision))
        assert graph_memory(short, memory, precision) - memory.activations == 2 * numbers


@pytest.mark.parametrize(
    ("settings", "verdict", "text"),
    [
        ({"strategy": "fsdp2"}, "note", "fsdp2 has nothing to shard in a single process"),
        ({"strategy": "fsdp2", "devices": 2, "num_nodes": 3}, "good", "fsdp2, 2 processes on each of 3 nodes"),
        ({"devices": 2}, "good", "ddp, 2 processes"),
    ],
)
def test_strategies_are_named(monkeypatch, settings, verdict, text):
    # Of some it has more to say with an older torch.
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.15.0")
    findings = examine(recipe_with(moe_config(), settings))
    found = next(finding for finding in findings if finding.topic == "strategy")
    assert found.verdict == verdict
    assert text in found.text


def test_a_full_disk_is_a_problem(monkeypatch):
    usage = room.shutil.disk_usage("/")
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    assert verdicts({})["disk"] == "problem"
    with_average, without = (room.disk(recipe_with(moe_config(n_embd=512), {"ema": {"decay": d}})) for d in (0.9, None))
    sizes = [float(finding.text.split(" GiB")[0].split()[-1]) for finding in (with_average, without)]
    assert sizes[0] / sizes[1] == pytest.approx(4 / 3, rel=0.2)


@pytest.mark.parametrize(
    ("settings", "bytes_each"),
    [
        ({}, 12),
        ({"precision": "bf16-true"}, 6),
        ({"precision": "bf16-true", "ema": {"decay": 0.9}}, 10),
        ({"precision": "bf16-mixed", "optimizer": "SGD"}, 4),
        ({"optimizer": "nonsense"}, 12),
    ],
    ids=str,
)
def test_a_checkpoint_has_the_type_of_its_weights(monkeypatch, settings, bytes_each):
    """The parameters, what the optimizer keeps of them, and their average in float32."""
    config = moe_config(n_embd=512)
    text = room.disk(recipe_with(config, {"precision": "32-true"} | settings)).text
    expected = bytes_each * count_parameters(config).total / 2**30
    assert f"takes about {expected:.2f} GiB" in text


def test_the_exit_status_tells(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"model_config": MODEL, "tokenizer_dir": str(tmp_path / "nothing")}))
    assert main(["doctor", str(recipe)]) == 1
    assert "PROBLEM" in capsys.readouterr().out
    assert main(["doctor"]) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's, and takes no files from root either")
def test_places_that_take_no_files_are_problems(tmp_path):
    data = {"class_path": "litgpt_moe_ext.data.TextCorpus", "init_args": {"data_path": "/proc/data"}}
    settings = {"out_dir": "/proc/out", "data": data}
    found = {finding.topic: finding for finding in examine(recipe_with(moe_config(), settings))}
    assert "data_path: '/proc/data' must be a folder in which the data can be prepared" in found["data"].text
    assert "out_dir: '/proc/out' must be a directory in which directories can be made" in found["out_dir"].text
    assert found["data"].verdict == found["out_dir"].verdict == "problem"
    of_a_run = examine(recipe_with(moe_config(), settings, checkpoint=tmp_path))  # which may be another machine's
    assert {"out_dir", "data"} & {finding.topic for finding in of_a_run if finding.verdict == "problem"} == set()


def test_data_that_may_not_be_looked_up_are_a_problem(tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    data = {"class_path": "litgpt_moe_ext.data.TextCorpus", "init_args": {"data_path": str(tmp_path)}}
    (found,) = (finding for finding in examine(recipe_with(moe_config(), {"data": data})) if finding.topic == "data")
    assert found.verdict == "problem"
    assert found.text.startswith(f"data: '{tmp_path}' cannot be looked up (Permission denied); have its owner")


def test_a_directory_that_is_not_a_runs_own_is_a_problem(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert verdicts({"out_dir": "."})["out_dir"] == "problem"
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "lit_model.pth").touch()
    assert verdicts({"out_dir": "final"})["out_dir"] == "problem"
    assert "out_dir" not in verdicts({"out_dir": "out"})


@pytest.mark.parametrize("target", ["nothing", "link"])
def test_a_link_to_nothing_is_no_place_for_files(target, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(target)
    data = {"class_path": "litgpt_moe_ext.data.TextCorpus", "init_args": {"data_path": "link/data"}}
    settings = {"out_dir": "link", "data": data}
    found = {finding.topic: finding for finding in examine(recipe_with(moe_config(), settings))}
    assert "out_dir: 'link' must be a directory in which directories can be made" in found["out_dir"].text
    assert found["data"].verdict == found["out_dir"].verdict == "problem"
    with pytest.raises(SettingsError, match="out_dir: 'link' must be a directory"):  # as a run says
        check_writable(Path("link"))


def test_a_tokenizer_of_the_model_is_good(moe_dir):
    config = moe_config(vocab_size=VOCABULARY_SIZE, padded_vocab_size=VOCABULARY_SIZE)
    (found,) = places.tokenizer(recipe_with(config, {"tokenizer_dir": str(moe_dir)}), [])
    assert (found.verdict, found.text) == ("good", f"{moe_dir} opens and fits the vocabulary")


def test_shards_are_not_prepared_by_the_run(tmp_path):
    data = {"class_path": "litgpt_moe_ext.data.TokenShards", "init_args": {"data_path": str(tmp_path)}}
    (found,) = places.data(recipe_with(moe_config(), {"data": data}), [])
    assert found.verdict == "problem"
    assert found.text == f"data.init_args.data_path: '{tmp_path}' must be a folder of token shards"


@pytest.mark.parametrize(("instructions", "verdict"), [("AVX2", "note"), ("AVX512", "good"), ("AMX_TILE", "good")])
def test_16_bits_are_slow_on_old_cpus(monkeypatch, instructions, verdict):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    assert computing.precision("bf16-true").verdict == verdict
    assert computing.precision("32-true").verdict == computing.precision(None).verdict == "good"


def test_a_missing_tokenizer_of_the_data_is_not_ok():
    of_data = {"class_path": "litgpt_moe_ext.data.TextCorpus", "init_args": {"tokenizer_dir": "/no/such"}}
    found = verdicts({"data": of_data})
    assert found["data"] == "problem"
    assert "tokenizer" not in found
    assert verdicts({"data": STDLIB})["tokenizer"] == "good"


def test_a_broken_tokenizer_is_a_finding(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    found = next(
        f for f in examine(recipe_with(moe_config(), {"tokenizer_dir": str(tmp_path)})) if f.topic == "tokenizer"
    )
    assert found.verdict == "problem"
    assert "cannot be opened" in found.text


@pytest.mark.slow
def test_settings_that_fit_fit(monkeypatch):
    """What is advised for a memory takes no more than that, by the model card; and no larger micro-batch fits."""
    recipe = recipe_with(moe_config(n_layer=2, padded_vocab_size=2048), {"train": {"global_batch_size": 24}})
    own = replace(recipe.step("bf16-mixed"), kernel_loss=True)
    monkeypatch.setattr("litgpt_moe_ext.inspect.cost.fit.triton_installed", lambda: True)
    memory = RUNTIME + training_memory(shorten(recipe.config), replace(own, micro_batch_size=7)).total
    fits = find_fits(recipe, memory)
    assert {fit.step.activation_checkpointing for fit in fits} == {"none", "selective", "full"}
    assert {fit.step.precision for fit in fits} == {"bf16-mixed", "bf16-true"}
    for fit in fits:
        assert fit.micro_batch_size in (1, 2, 3, 4, 6, 8, 12, 24)
        taken = training_memory(shorten(recipe.config), replace(fit.step, micro_batch_size=fit.micro_batch_size)).total
        assert taken == fit.bytes <= memory - RUNTIME
    plain = next(fit for fit in fits if fit.step == own)
    assert plain.micro_batch_size == 6
    assert plain in find_fits(recipe, RUNTIME + plain.bytes), "no more is needed"
    assert best_fit(fits) == plain, "it holds the recipe's micro-batch of 4 as it is"
    assert plain.flags(recipe) == "--precision bf16-mixed --train.micro_batch_size 6"


def test_the_fastest_settings_that_hold_the_recipes_micro_batch_are_advised():
    step = recipe_with(moe_config(), {"train": {"micro_batch_size": 4}}).step("bf16-mixed")
    nothing, few, enough, more = (Fit(step, size, 0) for size in (0, 2, 4, 8))
    assert best_fit([nothing, few, enough, more]) is enough
    assert best_fit([nothing, Fit(step, 1, 0), few]) is few, "the largest there is"
    assert best_fit([nothing]) is None


@pytest.mark.parametrize("own", [{}, {"activation_checkpointing": "full", "fused_cross_entropy": True}], ids=str)
def test_flags_of_settings_that_fit_make_the_recipe_these(own, tmp_path):
    """Also where the recipe has settings that save more memory than is needed."""
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"model_config": MODEL, **own}))
    recipe = load_recipe(file)
    for checkpointing, fuses in itertools.product(("none", "selective", "full"), (False, True)):
        step = replace(recipe.step("bf16-mixed"), activation_checkpointing=checkpointing, fused_cross_entropy=fuses)
        given = read_settings(["--config", str(file), *Fit(step, 2, 0).flags(recipe).split()])
        assert (given.precision, given.train.micro_batch_size) == ("bf16-mixed", 2)
        assert (given.activation_checkpointing, given.fused_cross_entropy) == (checkpointing, fuses)


def test_memory_by_command(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"model_config": MODEL, "train": {"global_batch_size": 4}}))
    assert main(["doctor", str(recipe), "--memory", "6"]) == 0
    assert "--precision bf16-mixed --train.micro_batch_size 4" in capsys.readouterr().out
    assert main(["doctor", str(recipe), "--memory", "0.5"]) == 1
    assert "Nothing fits" in capsys.readouterr().out
    assert main(["doctor", "--memory", "6"]) == 2


@pytest.mark.slow
def test_memory_in_the_precision_of_the_recipe(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump({"model_config": MODEL, "precision": "16-mixed", "train": {"global_batch_size": 4}})
    )
    assert main(["doctor", str(recipe), "--memory", "6"]) == 0
    assert "--precision 16-mixed --train.micro_batch_size 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"global_batch_size": 6, "micro_batch_size": 4}}, "train.global_batch_size: 6 is not a multiple"),
        ({"train": {"max_tokens": 10}}, "train.max_tokens: 10 must be at least one step"),
        ({"train": {"min_lr": 0.5}}, "train.min_lr: 0.5 must be at most the optimizer's learning rate"),
        ({"train": {"max_seq_length": 17}}, "train.max_seq_length: 17 must be from 1 to the model's block_size: 16"),
        ({"initial_checkpoint_dir": "nothing"}, "initial_checkpoint_dir: 'nothing' does not exist"),
        ({"tokenizer_dir": "nothing"}, "tokenizer_dir: 'nothing' must be a directory with a tokenizer"),
        pytest.param(
            {"strategy": "fsdp2", "devices": 2, "fused_cross_entropy": True},
            "fused_cross_entropy: true needs the whole",
            marks=needs_fused_loss,
        ),
        ({"evaluate": {"hellaswag": "nothing"}}, "evaluate.hellaswag: 'nothing' must be a file"),
        ({"checkpoint": {"export": "gguf"}}, "checkpoint.export: gguf: "),
        ({"data": None}, "data: null means litgpt.data.TinyLlama"),
        ({"logger_name": "mlflow"}, "logger_name: 'mlflow' needs the package mlflow, which is not installed; "),
        ({"data": {**STDLIB, "init_args": {"vocab_size": 321}}}, "vocab_size: 321 means 321 tokens"),
        ({"data": {**STDLIB, "init_args": {"val_fraction": 2}}}, "val_fraction: 2"),
        (
            {"model_config": {**MODEL, "attention_class_name": "SinkAttention", "attention_backend": "cudnn"}},
            "attention_backend: ",
        ),
        ({"data": TWO_STDLIBS}, "data.corpora.b: PythonStdlib trains a tokenizer of its own here"),
        ({"data": TWO_STDLIBS, "eval": {"max_iters": 1}}, "eval.max_iters: 1 must be at least 2, one batch per corpus"),
        ({"optimizer": {"class_path": "AdamW", "init_args": {"rate": 1}}}, "optimizer.init_args.rate: AdamW has no"),
        ({"optimizer": "Adamw"}, "optimizer: 'Adamw' must be the name of a class in torch.optim"),
        ({"optimizer": {"init_args": {"lr": 1}}}, "optimizer: {'init_args': {'lr': 1}} must be a name"),
        ({"optimizer": {"class_path": 7}}, "optimizer: {'class_path': 7} must be a name, or class_path and init_args"),
        ({"optimizer": ".near.Adam"}, "optimizer: '.near.Adam' must be the name of a class in torch.optim"),
        ({"data": {"class_path": "TextCorpus", "init_args": {"source_path": 5}}}, "data.source_path: 5 must be"),
        ({"data": {"class_path": "TextCorpus", "init_args": {"source_path": "."}}}, "data.tokenizer_dir: there is no"),
        ({"data": "TextCorpus"}, "data.source_path: must be given for litgpt_moe_ext.data.TextCorpus"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value.partition(":")[0],
)
def test_what_a_run_refuses_at_its_start_is_a_problem(changes, message, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump({"model_config": MODEL, "data": STDLIB, "out_dir": str(tmp_path / "out")} | changes)
    )
    assert main(["doctor", str(recipe)]) == 1
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("PROBLEM")]
    assert len(problems) == 1
    assert message in problems[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"class_path": "PreparedCorpus", "init_args": {"corpus_dir": 5}}}, "data.corpus_dir: 5 must be"),
        ({"data": {**STDLIB, "init_args": {"vocab_size": 321}}}, "data.vocab_size: 321 means 321 tokens"),
        ({"train": {"max_seq_length": 32}}, "train.max_seq_length: 32 must be from 1 to the model's block_size"),
    ],
    ids=["parsed", "data", "together"],
)
def test_a_problem_names_its_setting_and_line_as_a_run_does(changes, message, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    settings = {"model_config": MODEL, "data": STDLIB, "out_dir": str(tmp_path / "out")} | changes
    recipe.write_text(yaml.safe_dump(settings, sort_keys=False))
    name = message.partition(":")[0].rpartition(".")[2]
    *_, line = (n for n, text in enumerate(recipe.read_text().splitlines(), 1) if text.lstrip().startswith(name))
    assert main(["doctor", str(recipe)]) == 1
    (problem,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("PROBLEM"))
    assert message in problem
    assert problem.endswith(f"({recipe}:{line})")


def test_a_tokenizer_of_the_data_that_ends_no_document(tmp_path, capsys):
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    (tmp_path / "text.txt").write_text("a")
    files = {"source_path": str(tmp_path / "text.txt"), "tokenizer_dir": str(tmp_path)}
    text = {"class_path": "litgpt_moe_ext.data.TextCorpus", "init_args": files}
    mixture = {
        "class_path": "litgpt_moe_ext.data.Mixture",
        "init_args": {"corpora": {"a": text, "b": STDLIB}, "weights": {"a": 1, "b": 1}},
    }
    recipe = tmp_path / "recipe.yaml"
    for data in (text, mixture):
        recipe.write_text(yaml.safe_dump({"model_config": MODEL, "data": data, "out_dir": str(tmp_path / "out")}))
        assert main(["doctor", str(recipe)]) == 1
        problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("PROBLEM")]
        assert len(problems) == 1
        assert f"tokenizer_dir: '{tmp_path}' has no end-of-sequence token" in problems[0]


class TestStart:
    """The doctor finds what the start of a run would say of the checkpoint that it is to go on from."""

    @pytest.mark.parametrize("setting", ["initial_checkpoint_dir", "resume"])
    def test_a_checkpoint_in_its_different_states(self, setting, recipe, finished, tmp_path, capsys):
        folder = finished(tmp_path / "out") / "final"
        assert main(["doctor", str(recipe(**{setting: str(folder)}))]) == 0
        assert f"{folder}: complete; its checksums are checked" in self._line(capsys)
        (folder / "lit_model.pth").write_bytes((folder / "lit_model.pth").read_bytes()[:2000])
        self._is_problem(recipe(**{setting: str(folder)}), "is not a whole checkpoint: ", capsys)
        for name in ("SHA256SUMS", "training_state.json"):
            (folder / name).unlink()
        self._is_problem(recipe(**{setting: str(folder)}), "lit_model.pth is truncated or damaged", capsys)
        torch.save({"model": {}, "optimizer": {}}, folder / "lit_model.pth")
        self._is_problem(recipe(**{setting: str(folder)}), "lit_model.pth' holds other weights than the model", capsys)

    def test_all_but_the_numbers_is_compared(self, recipe, finished, tmp_path, capsys):
        out = finished(tmp_path / "out")
        (out / "final" / "tokenizer.json").write_text("{}")
        message = "tokenizer.json differs from its checksum in SHA256SUMS"
        self._is_problem(recipe(resume=str(out / "final")), f"is not a whole checkpoint: {message}", capsys)
        file = out / "step-00000012" / "lit_model.pth"
        weight = torch.load(file, weights_only=True)["model"]["lm_head.weight"].numpy().tobytes()
        file.write_bytes(file.read_bytes().replace(weight, weight[::-1]))
        assert main(["doctor", str(recipe(initial_checkpoint_dir=str(file.parent)))]) == 0
        assert f"from the weights in {file.parent}: " in self._line(capsys)
        assert main(["doctor", str(recipe(resume=str(out)))]) == 0
        passed_over, found = self._lines(capsys)
        assert f"Skipping checkpoint {out / 'final'}: {message}" in passed_over
        assert f"resumes from {file.parent}: " in found

    def test_the_newest_of_a_run(self, recipe, finished, tmp_path, capsys):
        self._is_problem(recipe(resume=True), "resume: true, but there is no checkpoint", capsys)
        assert main(["doctor", str(recipe(resume="auto"))]) == 0
        assert "from scratch: nothing to resume" in self._line(capsys)
        finished(tmp_path / "out", step=4)
        other = recipe(resume="auto", train={"global_batch_size": 6})
        self._is_problem(other, "train.global_batch_size: 6 does not divide the 16 sequences", capsys)
        assert main(["doctor", str(recipe(resume="auto"))]) == 0
        assert f"resumes from {tmp_path / 'out' / 'step-00000004'}" in self._line(capsys)
        self._is_problem(recipe(resume="auto", optimizer={"class_path": "torch.optim.SGD"}), "not of SGD", capsys)

    def _is_problem(self, file, message, capsys):
        assert main(["doctor", str(file)]) == 1
        line = self._line(capsys)
        assert line.startswith("PROBLEM")
        assert message in line

    def _line(self, capsys):
        (line,) = self._lines(capsys)
        return line

    def _lines(self, capsys):
        return [line for line in capsys.readouterr().out.splitlines() if line[9:].startswith("start ")]


def test_shards_are_opened_and_not_read(tmp_path, capsys):
    for name in ("train.bin", "val.bin"):
        write_shard(tmp_path / name, np.arange(300), 320)
    (tmp_path / "SHA256SUMS").write_text(f"{64 * '0'}  train.bin\n")
    recipe = tmp_path / "recipe.yaml"
    data = {"class_path": "litgpt_moe_ext.data.TokenShards", "init_args": {"data_path": str(tmp_path)}}
    recipe.write_text(yaml.safe_dump({"model_config": MODEL, "data": data, "out_dir": str(tmp_path / "out")}))
    assert main(["doctor", str(recipe)]) == 0
    (tmp_path / "train.bin").write_bytes((tmp_path / "train.bin").read_bytes()[:-2])
    assert main(["doctor", str(recipe)]) == 1
    assert "train.bin is truncated" in capsys.readouterr().out
    write_shard(tmp_path / "train.bin", np.arange(3), 320)
    assert main(["doctor", str(recipe)]) == 1
    assert f"but the training data in '{tmp_path}' has 3; use a shorter max_seq_length" in capsys.readouterr().out


@pytest.mark.parametrize("mixed", [False, True])
def test_a_prepared_corpus_is_looked_for(tmp_path, capsys, mixed):
    recipe = tmp_path / "recipe.yaml"
    data = {"class_path": "litgpt_moe_ext.data.PreparedCorpus", "init_args": {"corpus_dir": str(tmp_path / "web")}}
    if mixed:
        corpora = {"corpora": {"web": data}, "weights": {"web": 1}}
        data = {"class_path": "litgpt_moe_ext.data.Mixture", "init_args": corpora}
    recipe.write_text(yaml.safe_dump({"model_config": MODEL, "data": data, "out_dir": str(tmp_path / "out")}))
    assert main(["doctor", str(recipe)]) == 1
    name = "data.corpora.web.corpus_dir" if mixed else "corpus_dir"
    assert f"{name}: '{tmp_path / 'web'}' has no manifest.json" in capsys.readouterr().out


@pytest.mark.parametrize("mixed", [False, True])
def test_files_of_documents_are_found_and_not_read(tmp_path, capsys, mixed):
    source, recipe = tmp_path / "web", tmp_path / "recipe.yaml"
    source.mkdir()
    (source / "pages.parquet").write_text("no parquet")
    settings = {"source_path": str(source), "data_path": str(source), "bpe": {"vocab_size": 300}}
    data = {"class_path": "litgpt_moe_ext.data.FineWeb", "init_args": settings}
    if mixed:
        corpora = {"corpora": {"web": data}, "weights": {"web": 1}}
        data = {"class_path": "litgpt_moe_ext.data.Mixture", "init_args": corpora}
    recipe.write_text(yaml.safe_dump({"model_config": MODEL, "data": data, "out_dir": str(tmp_path / "out")}))
    assert main(["doctor", str(recipe)]) == 0
    (source / "pages.parquet").rename(source / "pages.json")
    assert main(["doctor", str(recipe)]) == 1
    assert "no files like '**/*.parquet', it has pages.json" in capsys.readouterr().out
    source.rename(tmp_path / "elsewhere")
    assert main(["doctor", str(recipe)]) == 1
    assert capsys.readouterr().out.count("PROBLEM") == 1


def test_connections_of_gpus_are_explained():
    found = links("\tGPU0\tGPU1\nGPU0\t X \tSYS\nGPU1\tSYS\t X \n")
    assert [finding.topic for finding in found] == ["links"] * len(found)
    assert any("talk through the interconnect between two CPUs" in finding.text for finding in found)
    assert any("NCCL_P2P_LEVEL=PHB" in finding.text for finding in found)
    assert links(None) == []


@pytest.mark.parametrize("source", ["a recipe", "a checkpoint"])
@pytest.mark.parametrize("command", ["doctor", "doctor --memory 6", "model-card"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": 5}, "train: 5 must be"),
        ({"train": {"micro_batch_size": "four"}}, "train.micro_batch_size: 'four' must be"),
        ({"devices": "two"}, "devices: 'two' must be"),
        ({"activation_checkpointing": "fulll"}, "activation_checkpointing: 'fulll' must be one of"),
        ({"ema": [0.9]}, "ema: [0.9] must be keys and values"),
        ({"optimizer": ["AdamW"]}, "optimizer: ['AdamW'] must be"),
        ({"strategy": ["ddp"]}, "strategy: ['ddp'] must be one of"),
    ],
)
def test_no_figure_is_made_of_a_wrong_setting(source, command, changes, message, tmp_path, capsys):
    recipe = tmp_path / ("recipe.yaml" if source == "a recipe" else "hyperparameters.yaml")
    recipe.write_text(yaml.safe_dump({"model_config": MODEL, **changes}))
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump(MODEL))
    name, *flags = command.split()
    assert main([name, str(recipe if source == "a recipe" else tmp_path), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert recipe.name in error


def test_settings_of_another_program_are_passed_over(tmp_path, capsys):
    settings = {
        "precision": "16-true",
        "lora_r": 8,
        "train": {"epochs": None, "other": 1},
        "eval": {"max_new_tokens": 9},
    }
    (tmp_path / "hyperparameters.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump(MODEL))
    assert main(["model-card", str(tmp_path)]) == 0
    assert "13,552 in total" in capsys.readouterr().out


@pytest.mark.parametrize(
    "data", [7, ["PythonStdlib"], {"class_path": 7}, {"class_path": "PythonStdlib", "init_args": 7}]
)
def test_data_without_a_class_are_a_problem(data):
    assert verdicts({"data": data})["data"] == "problem"


@pytest.mark.parametrize(
    "data", [{"init_args": {}}, {"class_path": "no.Such"}, {"class_path": "PythonStdlib", "init_args": 7}]
)
def test_what_is_wrong_with_data_is_one_problem(data, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"model_config": MODEL, "out_dir": str(tmp_path / "out"), "data": data}))
    assert main(["doctor", str(recipe)]) == 1
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("PROBLEM")]
    assert [line.split()[1] for line in problems] == ["settings"]


def test_a_setting_that_cannot_be_read_is_one_line(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"model_config": MODEL, "train": {"max_token": 5}}))
    assert main(["doctor", str(recipe)]) == 2
    error = capsys.readouterr().err
    assert "train.max_token" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", soon(["doctor", "model-card", "schedule"], ["doctor"]))
@pytest.mark.parametrize("setting", ["data", "callbacks", "optimizer"])
def test_nothing_that_a_checkpoint_names_is_imported(setting, command, finished, tmp_path, monkeypatch, capsys):
    """As a recipe, which the user has named, the same file is a program."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "stranger.py").write_text("raise SystemExit('it runs')")
    folder = finished(tmp_path / "out") / "final"
    file = folder / "hyperparameters.yaml"
    named = {"class_path": "stranger.Anything"}
    settings = yaml.safe_load(file.read_text()) | {setting: [named] if setting == "callbacks" else named}
    file.write_text(yaml.safe_dump(settings))
    assert main([command, str(folder)]) == (2 if setting == "optimizer" else 0)
    refused = "optimizer.class_path: 'stranger.Anything' is not imported, since a checkpoint may come from anyone"
    assert (refused in capsys.readouterr().err) == (setting == "optimizer")
    with pytest.raises(SystemExit, match="it runs"):
        main(["doctor", str(file)])
