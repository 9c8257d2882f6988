"""Training from the command line, in this process: checkpoints that LitGPT opens, exact resume, wrong inputs."""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from litgpt.data import DataModule
from litgpt.utils import save_config
from torch.utils.data import DataLoader

from litgpt_moe_ext.data.tokenizer.bpe import BPESettings, train_bpe
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.files import checksums
from litgpt_moe_ext.tokens.padding import PADDING, accept_padding
from litgpt_moe_ext.training.optim.schedules import Schedule
from litgpt_moe_ext.training.phases.inputs import check_own, open_tokenizer
from litgpt_moe_ext.training.settings import ScheduleArgs, TrainArgs
from tests.runs import ROOT, logged, refused, train, validation_fell_by, weights_of
from tests.settings import read_settings
from tests.subsets import soon


def test_a_run_from_start_to_generation(recipe, tmp_path, capsys):
    file = recipe(sample={"prompts": ["def "], "max_new_tokens": 5})
    assert train("--config", file) == 0
    output = capsys.readouterr().out

    out_dir = tmp_path / "out"
    assert sorted(p.name for p in out_dir.iterdir()) == [
        "best",
        "final",
        "metrics-wide.csv",
        "metrics.csv",
        "step-00000004",
        "step-00000008",
        "step-00000012",
        "train.log",
    ]
    final = out_dir / "final"
    expected = {"lit_model.pth", "model_config.yaml", "hyperparameters.yaml", "tokenizer.json", "tokenizer_config.json"}
    assert expected <= {p.name for p in final.iterdir()}
    state = json.loads((final / "training_state.json").read_text())
    expected = {"attempt": 1, "step": 12, "iteration": 24, "processes": 1}
    assert state == {**expected, "saved_at": state["saved_at"]}

    losses = [float(loss) for loss in logged(out_dir, "loss").values()]
    assert len(losses) == 12
    assert validation_fell_by(0.2, out_dir)
    assert len(logged(out_dir, "moe/max_vio")) == 12
    assert len(logged(out_dir, "grad_norm")) == 12
    assert list(logged(out_dir, "val_loss")) == [4, 8, 12]
    assert "MaxVio" in output
    assert "sample | def " in output
    assert "Trained 1,536 tokens" in output
    assert f"Best validation loss {min(map(float, logged(out_dir, 'val_loss').values())):.3f} after step" in output
    assert f"litgpt chat {out_dir / 'final'}" in output
    assert len(logged(out_dir, "tokens_per_second")) == 11
    assert all(0 <= float(share) < 1 for share in logged(out_dir, "data_wait").values())
    assert all(0.05 < float(memory) < 50 for memory in logged(out_dir, "memory_gb").values())
    perplexities = logged(out_dir, "ppl")
    assert all(math.isclose(float(perplexities[s]), math.exp(loss)) for s, loss in enumerate(losses, start=1))
    assert "a model of token frequencies alone has" in output

    biases = [w for name, w in weights_of(final).items() if name.endswith("e_score_correction_bias")]
    assert len(biases) == 2
    assert all(bias.abs().max() > 0.005 and bias.dtype == torch.float32 for bias in biases)

    from litgpt import LLM

    llm = LLM.load(str(final))
    assert isinstance(llm.generate("def ", max_new_tokens=5), str)
    loaded = [b for name, b in llm.model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert torch.equal(loaded[1], biases[1])


@pytest.mark.parametrize("mlp_class_name", ["SharedExpertMoE", "NoisyTopKMoE"])
def test_resume_is_exact(recipe, finished, tmp_path, mlp_class_name):
    """Interrupted after 6 of 12 steps, a run prints the losses of the uninterrupted one, digit for digit.

    The noisy router draws random numbers in every step, so their state must be resumed as well.
    """
    model = {"mlp_class_name": mlp_class_name}
    if mlp_class_name == "NoisyTopKMoE":
        model |= {"norm_topk_prob": None, "router_bias_update_rate": None}
    whole = recipe("whole", out_dir=str(tmp_path / "whole"), model_config=model)
    parts = recipe("parts", out_dir=str(tmp_path / "parts"), model_config=model, train={"save_interval": 3})
    if mlp_class_name == "NoisyTopKMoE":
        assert train("--config", whole) == 0
    else:
        finished(tmp_path / "whole")
    assert train("--config", parts, "--train.max_steps", "6") == 0
    shutil.rmtree(tmp_path / "parts" / "final")
    assert train("--config", parts, "--resume", "auto") == 0

    for column in ("loss", "learning_rate", "grad_norm", "moe/max_vio"):
        assert logged(tmp_path / "parts", column) == logged(tmp_path / "whole", column)
    ours, theirs = weights_of(tmp_path / "parts" / "final"), weights_of(tmp_path / "whole" / "final")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_resuming_a_finished_run_trains_on_with_more_tokens(recipe, tmp_path):
    """Only `final` is left of the first run; the second goes on from it."""
    file = recipe(train={"save_interval": 1000, "max_tokens": 4 * 128})
    assert train("--config", file) == 0
    assert train("--config", file, "--resume", "true", "--train.max_tokens", str(7 * 128)) == 0
    assert len(logged(tmp_path / "out", "loss")) == 7
    assert json.loads((tmp_path / "out" / "final" / "training_state.json").read_text())["step"] == 7


def test_resuming_a_finished_run_leaves_its_weights_alone(recipe, finished, tmp_path, capsys):
    """With settings by which they would lose something."""
    final = finished(tmp_path / "out") / "final"
    before = {path.name: path.read_bytes() for path in final.iterdir() if path.is_file()}
    assert train("--config", recipe(), "--resume", "auto", "--precision", "bf16-true") == 0
    assert "This run is finished" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in final.iterdir() if path.is_file()} == before


def test_a_truncated_checkpoint_is_passed_over(recipe, finished, tmp_path, capsys):
    shutil.rmtree(finished(tmp_path / "out") / "final")
    newest = tmp_path / "out" / "step-00000012" / "lit_model.pth"
    newest.write_bytes(newest.read_bytes()[:-1000])
    assert train("--config", recipe(), "--resume", "auto") == 0
    output = capsys.readouterr().out
    assert f"Skipping checkpoint {newest.parent}: lit_model.pth differs from its checksum" in output
    assert f"Resuming from {tmp_path / 'out' / 'step-00000008'}" in output


def test_damage_inside_a_checkpoint_is_noticed(finished, tmp_path):
    """One flipped byte in the weights, which loading alone would not notice."""
    from litgpt_moe_ext.training.checkpoint.resume import problem_with

    final = finished(tmp_path / "out") / "final"
    assert problem_with(final) is None
    listed = {line.split("  ")[1] for line in (final / "SHA256SUMS").read_text().splitlines()}
    files = {path.relative_to(final).as_posix() for path in final.rglob("*") if path.is_file()}
    assert listed == files - {"SHA256SUMS"}
    content = bytearray((final / "lit_model.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (final / "lit_model.pth").write_bytes(content)
    torch.load(final / "lit_model.pth", weights_only=True)
    assert problem_with(final) == "lit_model.pth differs from its checksum in SHA256SUMS"
    (final / "SHA256SUMS").unlink()
    assert problem_with(final) == "SHA256SUMS is missing"
    (final / "training_state.json").unlink()
    assert "is damaged in its record" in problem_with(final), "as in a checkpoint of plain LitGPT"


def test_a_new_run_loses_nothing_of_an_earlier_one(recipe, finished, tmp_path, capsys):
    """Not its checkpoints, and `--resume auto` continues the new run although the earlier one had got further."""
    file = recipe()
    finished(tmp_path / "out")
    earlier = (tmp_path / "out" / "final" / "lit_model.pth").read_bytes()
    assert train("--config", file, "--seed", "1", "--train.max_steps", "4") == 0
    assert f"Moved the checkpoints of an earlier run to {tmp_path / 'out-earlier-1'}" in capsys.readouterr().out
    assert (tmp_path / "out-earlier-1" / "final" / "lit_model.pth").read_bytes() == earlier
    shutil.rmtree(tmp_path / "out" / "final")
    assert train("--config", file, "--seed", "1", "--resume", "auto") == 0
    assert f"Resuming from {tmp_path / 'out' / 'step-00000004'}" in capsys.readouterr().out
    assert not (tmp_path / "out-earlier-2").exists()


@pytest.mark.parametrize(
    ("setting", "name"),
    [("expert_backend", "triton"), ("attention_backend", "flash")],
)
def test_a_kernel_that_does_not_work_here_is_refused_before_anything_moves(
    recipe, tmp_path, capsys, monkeypatch, setting, name
):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert train("--config", recipe(train={"max_tokens": 128})) == 0
    assert train("--config", recipe(model_config={setting: name}, train={"max_tokens": 128})) == 2
    assert f"{setting}: {name!r} cannot be used here: it works on cuda tensors" in capsys.readouterr().err
    assert (tmp_path / "out" / "final").is_dir()
    assert not (tmp_path / "out-earlier-1").exists()


def test_a_foreign_directory_is_not_deleted(recipe, tmp_path):
    (tmp_path / "out" / "final").mkdir(parents=True)
    (tmp_path / "out" / "final" / "precious.txt").write_text("mine")
    assert train("--config", recipe(train={"max_tokens": 128})) == 0
    assert (tmp_path / "out" / "final-earlier-1" / "precious.txt").read_text() == "mine"
    assert (tmp_path / "out" / "final" / "lit_model.pth").is_file()


def write_progress(directory: Path, attempt: int, step: int, saved_at: float = 0.0) -> None:
    from litgpt_moe_ext.training.checkpoint.progress import Progress

    directory.mkdir()
    Progress(attempt, step, 2 * step, 1, saved_at).write(directory)


def test_newest_is_the_last_step_of_the_last_attempt(tmp_path):
    """Whatever the clocks said, and whatever copying did to the files; plain LitGPT's checkpoints come after ours."""
    from litgpt_moe_ext.training.callbacks.retention import Best
    from litgpt_moe_ext.training.checkpoint.progress import newest_first, next_attempt

    # A run went to step 12, was resumed at step 4, and has got to step 8; its clock went back meanwhile.
    for name, attempt, step, saved_at in (
        ("final", 1, 12, 900.0),
        ("step-00000012", 1, 12, 899.0),
        ("step-00000004", 1, 4, 500.0),
        ("best", 2, 8, 120.0),
        ("step-00000008", 2, 8, 100.0),
        (".step-00000016.incomplete", 3, 16, 999.0),
    ):
        write_progress(tmp_path / name, attempt, step, saved_at)
    (tmp_path / "logs").mkdir()
    (tmp_path / "step-00000100").mkdir()
    (tmp_path / "step-00000100" / "lit_model.pth").touch()
    ours = ["step-00000008", "best", "final", "step-00000012", "step-00000004"]
    assert [path.name for path in newest_first(tmp_path)] == [*ours, "step-00000100"]
    assert next_attempt(tmp_path, tmp_path / "step-00000004") == 3
    assert [Best(1.0, attempt, 8).is_in(tmp_path / "best") for attempt in (1, 2)] == [False, True]
    assert next_attempt(tmp_path / "elsewhere", tmp_path / "step-00000008") == 3


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"[]", b"{}", b"null", b"\xff\xfe", b'{"step": 9}'),
        b'{"attempt": "1", "step": [], "iteration": 1, "x": 2}',
        b'{"attempt": "2", "step": 4, "iteration": 4, "processes": 1, "saved_at": 0.0}',
    ],
    ids=repr,
)
def test_a_damaged_state_file_is_passed_over(tmp_path, content, capsys):
    """Neither a traceback, nor a run that silently starts anew: it is named, and an older whole one is taken."""
    from litgpt_moe_ext.training.checkpoint.resume import find_resume_file

    for attempt, name in ((1, "step-00000004"), (1, "final")):
        write_progress(tmp_path / name, attempt, 4)
        torch.save({"model": {}, "optimizer": {}}, tmp_path / name / "lit_model.pth")
        (tmp_path / name / "model_config.yaml").write_text("")
        checksums.write(tmp_path / name)
    (tmp_path / "final" / "training_state.json").write_bytes(content)
    assert find_resume_file("auto", tmp_path) == tmp_path / "step-00000004" / "lit_model.pth"
    assert "training_state.json" in capsys.readouterr().out
    (tmp_path / "step-00000004" / "training_state.json").unlink()
    with pytest.raises(SettingsError, match="only damaged checkpoints"):
        find_resume_file("auto", tmp_path)
    assert "training_state.json" in capsys.readouterr().out


def test_accumulation_moves_the_bias_as_one_batch(recipe, tmp_path):
    for name, micro in (("one", 4), ("four", 1)):
        file = recipe(name, out_dir=str(tmp_path / name), train={"micro_batch_size": micro, "max_tokens": 3 * 128})
        assert train("--config", file) == 0
    one, four = weights_of(tmp_path / "one" / "final"), weights_of(tmp_path / "four" / "final")
    for name in one:
        if name.endswith("e_score_correction_bias"):
            assert torch.equal(one[name], four[name])


@pytest.mark.parametrize("micro", [1, 4])
def test_resume_with_other_micro_batches(recipe, finished, tmp_path, micro):
    """Steps, rates, tokens and data go on as with the old ones, although a step has another number of iterations."""
    finished(tmp_path / "whole")
    finished(tmp_path / "parts", step=4)
    parts = recipe("parts", out_dir=str(tmp_path / "parts"))
    assert train("--config", parts, "--resume", "auto", "--micro-batch-size", str(micro)) == 0
    for column in ("learning_rate", "total_tokens"):
        assert logged(tmp_path / "parts", column) == logged(tmp_path / "whole", column)
    ours, theirs = (
        {step: float(loss) for step, loss in logged(tmp_path / name, "loss").items()} for name in ("parts", "whole")
    )
    assert ours == pytest.approx(theirs, abs=2e-3)
    state = json.loads((tmp_path / "parts" / "final" / "training_state.json").read_text())
    assert (state["step"], state["iteration"]) == (12, 12 * 4 // micro)


@pytest.mark.parametrize(("rows", "last"), [(8, 8), (2, 20)])
def test_resume_with_other_batches(recipe, finished, tmp_path, capsys, rows, last):
    """It ends after as many tokens, at the end of the schedule, and a resume of the resume finds nothing to train."""
    finished(tmp_path / "out", step=4)
    arguments = ("--config", recipe(), "--resume", "auto", "--global-batch-size", str(rows))
    assert train(*arguments) == 0
    assert f"step {last}/{last} |" in capsys.readouterr().out
    tokens, rates = (logged(tmp_path / "out", column) for column in ("total_tokens", "learning_rate"))
    assert (list(tokens)[-1], float(tokens[last])) == (last, 12 * 128)
    planned = 12 * 4 // rows
    assert float(rates[last]) == Schedule(ScheduleArgs(), 1e-2, TrainArgs().min_lr, 2, planned).rate(planned - 1)
    assert train(*arguments) == 0
    assert "This run is finished; to train longer, add --train.max_tokens 3072\n" in capsys.readouterr().out


def test_hyperparameters_repeat_the_run(recipe, tmp_path):
    assert train("--config", recipe(train={"max_tokens": 2 * 128}), "--seed", "7", "--micro-batch-size", "4") == 0
    saved = tmp_path / "out" / "final" / "hyperparameters.yaml"
    settings = yaml.safe_load(saved.read_text())
    assert (settings["seed"], settings["train"]["micro_batch_size"]) == (7, 4)
    assert train("--config", saved, "--out_dir", tmp_path / "again") == 0
    assert logged(tmp_path / "again", "loss") == logged(tmp_path / "out", "loss")


def test_a_run_from_python(recipe, tmp_path, corpus_settings):
    from litgpt import Config

    from litgpt_moe_ext.data import PythonStdlib
    from litgpt_moe_ext.training.run import run
    from litgpt_moe_ext.training.settings import EvalArgs, Settings

    content = yaml.safe_load(recipe().read_text())
    run(
        Settings(
            model_config=Config(**content["model_config"]),
            out_dir=tmp_path / "out",
            data=PythonStdlib(**corpus_settings),
            train=TrainArgs(**content["train"]),
            eval=EvalArgs(**content["eval"]),
            devices=1,
        )
    )
    settings = yaml.safe_load((tmp_path / "out" / "final" / "hyperparameters.yaml").read_text())
    assert settings["data"]["class_path"].endswith("PythonStdlib")
    assert settings["model_config"]["n_expert"] == 8


def test_starting_from_the_weights_of_a_run(recipe, finished, tmp_path):
    """The first loss is that of the trained model; what is counted in steps begins anew, and training may differ."""
    weights, model = tmp_path / "weights", {"router_bias_update_schedule": {"warmup_steps": 2000}}
    weights.mkdir()
    trained = finished(tmp_path / "out") / "final"
    content = torch.load(trained / "lit_model.pth", weights_only=True)
    counts = {f"transformer.h.{layer}.mlp.gate.bias_updates": torch.tensor(1000) for layer in range(2)}
    torch.save({**content, "model": content["model"] | counts}, weights / "lit_model.pth")
    config = yaml.safe_load((trained / "model_config.yaml").read_text())
    (weights / "model_config.yaml").write_text(yaml.safe_dump(config | model))
    model |= {"router_z_loss_coef": 1e-3}
    start = ("--initial_checkpoint_dir", weights, "--out_dir", tmp_path / "next")
    assert train("--config", recipe(train={"max_tokens": 128}, model_config=model), *start) == 0
    first_of_old, first_of_new = (float(logged(tmp_path / d, "loss")[1]) for d in ("out", "next"))
    assert first_of_new < first_of_old - 0.1
    after = torch.load(tmp_path / "next" / "final" / "lit_model.pth", weights_only=True)["model"]
    assert [int(after[name]) for name in counts] == [1, 1]


def test_max_time_lets_at_least_one_step_be_trained(recipe, tmp_path, capsys):
    """Without any, the final weights would be untrained, and a resumed run would never go on."""
    file = recipe(train={"max_time": 1e-12, "save_interval": 100_000})
    assert train("--config", file) == 0
    assert train("--config", file, "--resume", "auto") == 0
    assert list(logged(tmp_path / "out", "loss")) == [1, 2]
    assert "train.max_time: 0 must be a number above 0, or null" in refused(
        capsys, "--config", file, "--train.max_time=0"
    )


def test_max_time_ends_with_a_final_checkpoint(recipe, tmp_path):
    file = recipe(train={"max_tokens": 100_000 * 128, "max_time": 0.5, "save_interval": 100_000})
    assert train("--config", file) == 0
    steps = json.loads((tmp_path / "out" / "final" / "training_state.json").read_text())["step"]
    assert 1 <= steps < 100_000


class Resumable(DataLoader):
    """A loader that says how far it has been read: here always not at all."""

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@dataclass
class OneRow(DataModule):
    """Less than a micro-batch to train on, which torch's loader leaves out without a word."""

    loader = Resumable

    def connect(self, tokenizer=None, batch_size=1, max_seq_length=0):
        self._row, self._batch_size = torch.zeros(max_seq_length + 1, dtype=torch.int64), batch_size

    def train_dataloader(self):
        return self.loader([self._row], self._batch_size, drop_last=True)

    def val_dataloader(self):
        return DataLoader([self._row])


class Unresumable(OneRow):
    """Data whose loader does not say how far it has been read."""

    loader = DataLoader


class Listed(OneRow):
    """Data that comes as a list of batches."""

    def train_dataloader(self):
        return [self._row]


class Plain(DataModule):
    """Rows of one token, in a class that is no dataclass."""

    def __init__(self, token: int = 0):
        super().__init__()
        self.token = token

    def connect(self, tokenizer=None, batch_size=1, max_seq_length=0):
        self._rows, self._batch_size = torch.full((8, max_seq_length + 1), self.token), batch_size

    def train_dataloader(self):
        return Resumable(self._rows, self._batch_size)

    def val_dataloader(self):
        return DataLoader(self._rows, self._batch_size)


BATCHES = {
    "float32": lambda rows: rows.float(),
    "bool": lambda rows: rows.bool(),
    "long": lambda rows: rows.repeat(1, 2),
    "short": lambda rows: rows[:, 1:],
    "flat": lambda rows: rows.flatten(),
    "empty": lambda rows: rows[:0],
    "dict": lambda rows: {"input_ids": rows, "labels": rows},
    "pair": lambda rows: (rows[:, :-1], rows[:, 1:]),
    "unknown": lambda rows: rows.index_fill(1, torch.tensor(1), 304),
    "int32": lambda rows: rows.to(torch.int32),
    "uint16": lambda rows: rows.to(torch.uint16),
    "negative": lambda rows: rows.index_fill(1, torch.tensor(3), -1),
    "padded": lambda rows: rows.index_fill(1, torch.tensor([31, 32]), PADDING),
}


@dataclass
class Odd(DataModule):
    """Batches in forms that data modules of other packages may have."""

    train: str = "int32"
    val: str = "int32"
    pads: bool = False

    def connect(self, tokenizer=None, batch_size=1, max_seq_length=0):
        accept_padding(self.pads)
        self._batch = torch.zeros(batch_size, max_seq_length + 1, dtype=torch.int64)

    def _loader(self, form):
        return Resumable([BATCHES[form](self._batch)] * 8, batch_size=None)

    def train_dataloader(self):
        return self._loader(self.train)

    def val_dataloader(self):
        return self._loader(self.val)


@pytest.mark.parametrize("form", ["int32", "uint16", "padded"])
def test_batches_of_any_integers(recipe, form):
    data = {"class_path": f"{__name__}.Odd", "init_args": {"train": form, "val": form, "pads": form == "padded"}}
    assert train("--config", recipe(data=data, train={"max_tokens": 256})) == 0


def test_data_need_no_dataclass(recipe, tmp_path):
    data = {"class_path": f"{__name__}.Plain", "init_args": {"token": 3}}
    assert train("--config", recipe(data=data, train={"max_tokens": 256})) == 0
    kept = yaml.safe_load((tmp_path / "out" / "final" / "hyperparameters.yaml").read_text())
    assert kept["data"] == data
    assert train("--config", recipe(data=data, train={"max_tokens": 512}), "--resume", "auto") == 0


class TestWrongInputs:
    """One clear message, exit status 2, and nothing lost."""

    def test_no_batch(self, recipe, tmp_path, capsys):
        file = recipe(data={"class_path": f"{__name__}.OneRow", "init_args": None})
        assert "data: too little for one batch of train.micro_batch_size: 2" in refused(capsys, "--config", file)
        assert not (tmp_path / "out" / "final").exists()

    @pytest.mark.parametrize(
        ("data", "wrong"),
        [("Unresumable", "DataLoader without state_dict"), ("Listed", "list, which Fabric cannot set up; return")],
    )
    def test_loaders_that_a_run_cannot_use(self, recipe, tmp_path, capsys, data, wrong):
        file = recipe(data={"class_path": f"{__name__}.{data}", "init_args": None})
        assert f"data: train_dataloader returns a {wrong}" in refused(capsys, "--config", file)
        assert not (tmp_path / "out" / "final").exists()

    @pytest.mark.parametrize("side", soon(["train", "val"], ["train"]))
    @pytest.mark.parametrize(
        ("form", "came"),
        [
            ("float32", "is of the type float32 and the shape (2, 33); it must be one tensor of token ids"),
            ("bool", "is of the type bool and the shape (2, 33)"),
            (
                "long",
                "is of the type int64 and the shape (2, 66); it must be one tensor of token ids, integers of the shape "
                "(train.micro_batch_size, 33)",
            ),
            ("short", "is of the type int64 and the shape (2, 32)"),
            ("flat", "is of the type int64 and the shape (66,)"),
            ("empty", "is of the type int64 and the shape (0, 33)"),
            ("dict", "is a dict of input_ids, labels"),
            ("pair", "is a list of 2"),
            ("negative", "has the token id -1; ids must not be below zero, except -100 for padding, where"),
            ("padded", "has the token id -100; ids must not be below zero"),
            ("unknown", "has the token id 304, beyond the model's padded_vocab_size: 304"),
        ],
    )
    def test_batches_of_another_form(self, recipe, tmp_path, capsys, form, came, side):
        file = recipe(data={"class_path": f"{__name__}.Odd", "init_args": {side: form}})
        assert f"data: a batch of {side}_dataloader {came}" in refused(capsys, "--config", file)
        assert not (tmp_path / "out" / "final").exists()

    @pytest.mark.parametrize("name", ["missing", "empty"])
    def test_no_corpus(self, recipe, tmp_path, capsys, name):
        (tmp_path / "empty").mkdir()
        source = ("--data.source_path", tmp_path / name, "--data.data_path", tmp_path / "d")
        assert "source_path" in refused(capsys, "--config", recipe(), *source)

    def test_tokenizer_without_eos(self, recipe, tmp_path, capsys):
        folder = tmp_path / "tokenizer"
        train_bpe(["some text"], BPESettings(300), folder)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        del config["eos_token"]
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        error = refused(capsys, "--config", recipe(), "--tokenizer_dir", folder)
        assert "has no end-of-text token" in error
        assert 'Add "eos_token"' in error

    def test_tokenizer_with_an_id_beyond_the_model(self, tmp_path):
        """Its number of tokens would fit."""
        folder = tmp_path / "tokenizer"
        train_bpe(["some text"], BPESettings(300), folder)
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary[max(vocabulary, key=vocabulary.get)] = 5000
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        with pytest.raises(SettingsError, match="has ids up to 5000, beyond the model's padded_vocab_size: 304"):
            open_tokenizer(folder, 304)

    def test_tokenizer_larger_than_the_model(self, recipe, capsys):
        file = recipe(model_config={"vocab_size": 280, "padded_vocab_size": 280})
        assert "300 tokens, more than the model's padded_vocab_size of 280" in refused(capsys, "--config", file)

    def test_weights_that_know_other_tokens(self, recipe, finished, tmp_path, capsys):
        """Another tokenizer of the same size, which every shape suits."""
        other = tmp_path / "other"
        other.mkdir()
        for name in range(10):
            (other / f"module_{name}.py").write_text("".join(f"zebra_{n} = 'quagga {n * name}'\n" for n in range(300)))
        final = finished(tmp_path / "out") / "final"
        start = ("--initial_checkpoint_dir", final, "--out_dir", tmp_path / "next")
        data = ("--data.source_path", other, "--data.val_fraction", "0.5")
        error = refused(capsys, "--config", recipe(), *start, *data)
        assert f"initial_checkpoint_dir: '{final}' has another tokenizer than the data" in error
        (final / "tokenizer.json").unlink()
        assert train("--config", recipe(train={"max_tokens": 128}), *start, *data) == 0

    def test_unknown_class(self, recipe, capsys):
        error = refused(capsys, "--config", recipe(model_config={"mlp_class_name": "SharedExprtMoE"}))
        assert "SharedExprtMoE" in error
        assert "SharedExpertMoE" in error

    def test_unwritable_out_dir(self, recipe, tmp_path, capsys):
        (tmp_path / "file").write_text("in the way")
        assert "out_dir" in refused(capsys, "--config", recipe(), "--out_dir", tmp_path / "file" / "out")

    def test_checkpoint_of_another_shape(self, recipe, finished, tmp_path, capsys):
        before = (finished(tmp_path / "out") / "final" / "lit_model.pth").read_bytes()
        error = refused(capsys, "--config", recipe(model_config={"n_embd": 32}), "--resume", "auto")
        assert "n_embd is 16 in the checkpoint and 32 now" in error
        assert (tmp_path / "out" / "final" / "lit_model.pth").read_bytes() == before

    def test_a_run_that_does_not_fit_its_checkpoint(self, recipe, finished, tmp_path, capsys):
        checkpoint = finished(tmp_path / "out", step=4) / "step-00000004"
        resume = ("--config", recipe(), "--resume", "auto")
        error = refused(capsys, *resume, "--optimizer", "SGD")
        assert "holds the state of the optimizer AdamW, not of SGD" in error
        error = refused(capsys, *resume, "--micro-batch-size", "3", "--global-batch-size", "3")
        assert "train.global_batch_size: 3 does not divide the 16 sequences that the checkpoint was" in error
        error = refused(capsys, *resume, "--train.tie_embeddings", "true")
        assert "train.tie_embeddings: True must be False, as in the checkpoint" in error
        config = checkpoint / "model_config.yaml"
        config.write_text(config.read_text() + "foo: 1\n")
        assert "found only damaged checkpoints" in refused(capsys, *resume)
        for name in ("SHA256SUMS", "training_state.json"):  # as in a checkpoint of plain LitGPT
            (checkpoint / name).unlink()
        error = refused(capsys, *resume)
        assert f"resume: {config} has the field foo, which this version does not know; if an extension adds it" in error

    def test_weights_with_two_tables_that_are_to_be_one(self, recipe, finished, tmp_path, capsys):
        """A tied model that starts from them would keep one of the two; from those of a tied run it starts as usual."""
        train_to = ("--config", recipe(train={"max_tokens": 128, "tie_embeddings": True}), "--out_dir")
        start = ("--initial_checkpoint_dir", finished(tmp_path / "out") / "final")
        assert "train.tie_embeddings: true would lose a table" in refused(capsys, *train_to, tmp_path / "next", *start)
        assert train(*train_to, tmp_path / "tied") == 0
        assert train(*train_to, tmp_path / "next", "--initial_checkpoint_dir", tmp_path / "tied" / "final") == 0

    def test_unreadable_files(self, recipe, tmp_path, capsys):
        (tmp_path / "binary.yaml").write_bytes(b"\x9d\xff" * 100)
        assert "not a text file" in refused(capsys, "--config", tmp_path / "binary.yaml")
        folder = tmp_path / "tokenizer"
        folder.mkdir()
        (folder / "tokenizer.json").write_text("{")
        error = refused(capsys, "--config", recipe(), "--tokenizer_dir", folder)
        assert "cannot be opened" in error

    def test_weights_of_another_shape(self, recipe, finished, tmp_path, capsys):
        start = ("--initial_checkpoint_dir", finished(tmp_path / "out") / "final", "--out_dir", tmp_path / "other")
        error = refused(capsys, "--config", recipe(model_config={"n_embd": 32}), *start)
        assert "initial_checkpoint_dir" in error
        assert "n_embd is 16 in the checkpoint and 32 now" in error

    def test_nothing_to_resume(self, recipe, tmp_path, capsys):
        assert "use --resume auto" in refused(capsys, "--config", recipe(), "--resume", "true")
        error = refused(capsys, "--config", recipe(), "--resume", tmp_path / "nowhere")
        assert "is not a whole checkpoint: there is no such directory" in error

    def test_only_damaged_checkpoints(self, recipe, tmp_path, capsys):
        folder = tmp_path / "out" / "step-00000004"
        folder.mkdir(parents=True)
        (folder / "lit_model.pth").write_bytes(b"not a checkpoint")
        (folder / "model_config.yaml").write_text("{}")
        assert "found only damaged checkpoints" in refused(capsys, "--config", recipe(), "--resume", "auto")

    def test_weights_that_are_damaged(self, recipe, tmp_path, capsys):
        folder, file = tmp_path / "weights", recipe()
        folder.mkdir()
        save_config(read_settings(["--config", str(file)]).model_config, folder)
        torch.save({"a": torch.zeros(1000)}, folder / "lit_model.pth")
        content = (folder / "lit_model.pth").read_bytes()
        for damaged in (content[:2000], content.replace(bytes(100), bytes(99) + b"x", 1)):
            (folder / "lit_model.pth").write_bytes(damaged)
            error = refused(capsys, "--config", file, "--initial_checkpoint_dir", folder)
            assert f"initial_checkpoint_dir: '{folder}' is not a whole checkpoint: lit_model.pth is " in error

    @pytest.mark.parametrize("start", ["--initial_checkpoint_dir", "--resume"])
    def test_weights_of_another_model(self, start, recipe, finished, tmp_path, capsys):
        """Beside a configuration that is this one's: before documents are prepared and earlier runs moved."""
        folder = tmp_path / "folder"
        finished(tmp_path / "out")
        shutil.copytree(tmp_path / "out" / "final", folder)
        for name in ("SHA256SUMS", "training_state.json"):
            (folder / name).unlink()
        content = torch.load(folder / "lit_model.pth", weights_only=True)
        sinks = content["model"].pop("transformer.h.0.attn.sinks")
        for others, message in (
            ({}, 'Missing key(s) in state_dict: "transformer.h.0.attn.sinks"'),
            ({"transformer.h.0.attn.sinks": sinks[:1].clone()}, "size mismatch for transformer.h.0.attn.sinks"),
        ):
            torch.save({**content, "model": content["model"] | others}, folder / "lit_model.pth")
            error = refused(capsys, "--config", recipe(), start, folder)
            assert f"{start[2:]}: '{folder / 'lit_model.pth'}' holds other weights than the model beside it: " in error
            assert message in error
            assert not (tmp_path / "out-earlier-1").exists()

    def test_a_checkpoint_is_no_place_for_a_run(self, recipe, tmp_path, capsys):
        (tmp_path / "lit_model.pth").touch()
        error = refused(capsys, "--config", recipe(), "--out_dir", tmp_path)
        assert f"out_dir: '{tmp_path}' is a checkpoint, which another run may replace" in error

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--global-batch-size", "7"], "train.global_batch_size: 7 is not a multiple"),
            (["--train", "3"], "train: 3 must be keys and values"),
            (["--micro-batch-size", "0"], "train.micro_batch_size: 0 must be an integer of at least 1"),
            (["--max-seq-length", "33"], "train.max_seq_length: 33 must be from 1 to the model's block_size: 32"),
            (["--train.max_tokens", "100"], "train.max_tokens: 100 must be at least one step of 128 tokens"),
            (
                ["--sample.prompts", '["x"]', "--sample.max_new_tokens", "0"],
                "sample.max_new_tokens: 0 must be an integer of at least 1",
            ),
            (["--initial_checkpoint_dir", "nowhere"], "initial_checkpoint_dir: 'nowhere' does not exist"),
            (["--model_config.block_size", "0"], "model_config.block_size: 0 must be an integer of at least 1"),
            (["--train.save_interval", "0"], "train.save_interval: 0 must be an integer of at least 1, or null"),
            (["--train.log_interval", "0"], "train.log_interval: 0 must be an integer of at least 1"),
            (["--eval.interval", "0"], "eval.interval: 0 must be an integer of at least 1"),
            (["--eval.max_iters", "0"], "eval.max_iters: 0 must be an integer of at least 1"),
            (["--seed", "-5"], "seed: -5 must be an integer from 0 to 4294967295"),
            (["--optimizer.class_path", "7"], "optimizer: {'class_path': 7, 'init_args': {'lr': 0.01}} must be a name"),
            (["--optimizer", "AdamWW"], "optimizer: 'AdamWW' must be the name of a class in torch.optim"),
            (
                ["--optimizer.init_args.lrr", "0.1"],
                "optimizer.init_args.lrr: AdamW has no such argument; did you mean",
            ),
            (["--optimizer.lr", "much"], "optimizer.init_args.lr: 'much' must be a number"),
            (["--sample.top_k", "0"], "sample.top_k: 0 must be an integer of at least 1, or null"),
            (["--model_config.n_head", "3"], "model_config.n_head: 3 must divide n_embd: 16"),
            (["--model_config.n_query_groups", "3"], "model_config.n_query_groups: 3 must divide n_head: 4"),
            (["--logger_name", "mlflow"], "logger_name: 'mlflow' needs the package mlflow, which is not installed; "),
            (["--tokenizer_dir", "/nope"], "tokenizer_dir: '/nope' must be a directory"),
            (["--train.max_tokens", "null"], "train.max_tokens: null must be an integer of at least 1"),
            (["--train.epochs", "0"], "train.epochs: 0 must be an integer of at least 1, or null"),
            (["--train.max_norm", "0"], "train.max_norm: 0 must be a number above 0"),
            (["--train.min_lr", "1"], "train.min_lr: 1.0 must be at most the optimizer's learning rate, 0.01"),
            (["--devices", "0"], "devices: 0 must be auto, -1 or an integer of at least 1"),
            (["--num_nodes", "0"], "num_nodes: 0 must be an integer of at least 1"),
            (["--out_dir", ""], "out_dir: '.' is the working directory"),
            (["--model_config.n_layer", "0"], "model_config.n_layer: 0 must be an integer from 1 to 10000"),
            (["--peak_tflops", "0"], "peak_tflops: 0 must be a number above 0, or null"),
        ],
        ids=str,
    )
    def test_settings(self, recipe, capsys, arguments, message):
        assert message in refused(capsys, "--config", recipe(), *arguments)


@pytest.mark.parametrize(
    ("place", "what"),
    [
        ("/", "the root of the file system"),
        ("home", "your home directory"),
        ("link", "your home directory"),
        (ROOT, "where this package is installed"),
    ],
)
def test_places_of_other_things(tmp_path, monkeypatch, place, what):
    """The check by itself, as a run would leave its files there."""
    (tmp_path / "home").mkdir()
    (tmp_path / "link").symlink_to("home")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match=f"out_dir: '.*' is {what}; give the run a directory of its own"):
        check_own(Path(place))
    check_own(tmp_path / "home" / "out")


def test_yarn_trains_on_beyond_the_original_length(recipe, tmp_path, capsys):
    """A model with YaRN from 16 to 64 tokens is trained at 16, then from its weights at 64, and not at 65."""
    yarn = {"factor": 4.0, "original_max_seq_len": 16, "beta_fast": 8.0, "beta_slow": 1.0}
    model = {"block_size": 64, "rope_adjustments": yarn, "norm_qk": True, "sliding_window_size": 12}
    short = recipe("short", model_config=model, train={"max_seq_length": 16, "max_tokens": 6 * 4 * 16})
    assert train("--config", short) == 0
    longer = ("--initial_checkpoint_dir", tmp_path / "out" / "final", "--out_dir", tmp_path / "longer")
    tokens = ("--train.max_tokens", 6 * 4 * 64)
    assert train("--config", short, "--train.max_seq_length", 64, *longer, *tokens) == 0
    before, after = (logged(tmp_path / name, "loss") for name in ("out", "longer"))
    assert len(before) == len(after) == 6
    assert float(after[1]) < float(before[1]) - 0.1  # it goes on from the weights
    assert train("--config", short, "--train.max_seq_length", 65, *longer, *tokens) == 2
    assert "train.max_seq_length: 65 must be from 1 to the model's block_size: 64" in capsys.readouterr().err
