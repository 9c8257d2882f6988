"""Every recipe from raw data to text, scaled down by other numbers on the command line."""

import runpy
import sys
from pathlib import Path

import pytest
from litgpt.__main__ import main as litgpt_main
from transformers import pipeline

from litgpt_moe_ext.cli.train import main
from tests.export.hf.transformers5 import compare
from tests.recipes.exports import check_export
from tests.recipes.files import RECIPES, ROOT, commands, path_of
from tests.recipes.scaled import BATCH, LENGTH, RAW_DATA, overrides
from tests.runs import logged, run_command

# One of each kind of model. The others differ from them in numbers and in the form of the data.
FAMILIES = ("code-moe-60m", "gpt-moe-fineweb", "nanogpt-moe-tinystories")
# Many CPUs are slow in 16 bits with a vocabulary like these; most of their entries no tokenizer of these tests has.
LARGE_VOCABULARY = {
    "code-moe-60m": [f"--model_config.{name}=1024" for name in ("vocab_size", "padded_vocab_size")],
    "gpt-moe-fineweb": [
        f"--{name}=512" for name in ("model_config.vocab_size", "model_config.padded_vocab_size", "data.vocab_size")
    ],
}
EXPORTED_AS = {
    "code-moe-800m": "LitGPTMoEForCausalLM",
    "gpt-dense-fineweb": "GPT2LMHeadModel",
    "moe-200m-tinystories": "Ernie4_5_MoeForCausalLM",
    "nanogpt-tinystories": "GPT2LMHeadModel",
}
OTHERS = [recipe for recipe in RECIPES if recipe not in FAMILIES]


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> Path:
    """A folder with a case for transformers 5 of every recipe that was trained."""
    return tmp_path_factory.mktemp("cases")


def losses(out_dir: Path, column: str = "loss") -> dict[int, float]:
    return {step: float(value) for step, value in logged(out_dir, column).items()}


def preparations(recipe: str) -> list[list[str]]:
    """Return script and arguments of the header's first command for each script, where paths of the hub are local."""
    found = {arguments[0]: arguments for arguments in reversed(commands(recipe, "python"))}
    scripts = [arguments for script, arguments in reversed(found.items()) if script.startswith("data_prep/")]
    for arguments in scripts:
        if arguments[0] == "data_prep/fineweb.py":
            arguments += ["--source_path", "parquet", "--val_fraction", "0.1"]
    return scripts


def data_arguments(recipe: str, folder: Path) -> list[str]:
    """Return the setting for data that the preparation names itself."""
    if recipe != "gpt-dense-fineweb":
        return []
    (corpus,) = (path.parent for path in (folder / "data" / "fineweb_edu").glob("*/manifest.json"))
    return ["--data.data_path", str(corpus.relative_to(folder))]


def train_and_resume(recipe: str, folder: Path, steps: int, *more: str) -> Path:
    """Train in this process, the second half after a resume, and return the checkpoints' folder."""
    command = ["--config", str(path_of(recipe)), *overrides(recipe, steps), *data_arguments(recipe, folder), *more]
    assert main([*command, "--train.max_steps", str(steps // 2)]) == 0
    out_dir = folder / "checkpoints" / recipe
    assert main([*command, "--resume", str(out_dir / f"step-{steps // 2:08}")]) == 0
    assert list(losses(out_dir)) == list(range(1, steps + 1))
    assert (out_dir / "best" / "lit_model.pth").is_file()
    assert bool(losses(out_dir, "moe/max_vio")) == ("moe" in recipe)
    return out_dir


@pytest.mark.parametrize("recipe", FAMILIES)
def test_trains_and_resumes(recipe, tmp_path, monkeypatch, capsys):
    """In this process: data that training prepares, four steps, of which the last two after a resume."""
    monkeypatch.chdir(tmp_path)
    RAW_DATA[recipe](tmp_path)
    for script, *arguments in preparations(recipe):
        if script.endswith("tokenizer.py"):
            runpy.run_path(str(ROOT / script))["main"](arguments)
    found = losses(train_and_resume(recipe, tmp_path, 4, *LARGE_VOCABULARY.get(recipe, [])))
    assert found[4] < found[1]
    output = capsys.readouterr().out
    assert "Resuming from" in output
    assert "sample | " in output


@pytest.mark.slow
@pytest.mark.parametrize("recipe", OTHERS)
def test_from_raw_data_to_text_in_this_process(recipe, tmp_path, cases, monkeypatch, capsys):
    """The header's commands one after the other: prepare, train, resume, write text."""
    monkeypatch.chdir(tmp_path)
    RAW_DATA[recipe](tmp_path)
    for script, *arguments in preparations(recipe):
        runpy.run_path(str(ROOT / script))["main"](arguments)
    capsys.readouterr()
    # Many CPUs are slow in bfloat16.
    out_dir = train_and_resume(recipe, tmp_path, 20, "--precision=32-true")
    found = losses(out_dir)
    assert found[20] < found[1] - 1
    assert check_export(out_dir / "best", cases / recipe) == EXPORTED_AS[recipe]
    assert recipe == "gpt-dense-fineweb" or "Reusing the corpus" in capsys.readouterr().out
    (arguments,) = commands(recipe, "litgpt generate")
    command = ["litgpt", "generate", *arguments, "--max_new_tokens", "8", "--num_samples", "1"]
    monkeypatch.setattr(sys, "argv", command)
    litgpt_main()
    assert arguments[-1] in capsys.readouterr().out


def run(folder: Path, *command: str | Path) -> str:
    return run_command(*command, cwd=folder, OMP_NUM_THREADS="1").stdout


@pytest.mark.slow
@pytest.mark.parametrize("recipe", FAMILIES)
def test_from_raw_data_to_text(recipe, tmp_path, cases):
    """The header's commands one after the other, as processes: prepare, train, write text."""
    RAW_DATA[recipe](tmp_path)
    for script, *arguments in preparations(recipe):
        if recipe != "gpt-moe-fineweb" or script.endswith("tokenizer.py"):
            run(tmp_path, sys.executable, ROOT / script, *arguments)
    output = run(
        tmp_path,
        sys.executable,
        ROOT / "run_train.py",
        "--config",
        path_of(recipe),
        *overrides(recipe, 20),
        *data_arguments(recipe, tmp_path),
        *(["--precision=32-true"] if recipe in LARGE_VOCABULARY else []),
    )
    final = tmp_path / "checkpoints" / recipe / "final"
    assert check_export(final, cases / recipe) == "LitGPTMoEForCausalLM"
    assert "fineweb" in recipe or "Reusing the corpus" in output
    found = losses(tmp_path / "checkpoints" / recipe)
    assert len(found) == 20
    assert found[20] < found[1] - 1
    (arguments,) = commands(recipe, "litgpt generate")
    litgpt = Path(sys.executable).parent / "litgpt"
    text = run(tmp_path, litgpt, "generate", *arguments, "--max_new_tokens", "8", "--num_samples", "1")
    assert arguments[-1] in text


@pytest.mark.slow
def test_the_quickstart(tmp_path, cases, monkeypatch, corpus_settings):
    monkeypatch.chdir(tmp_path)
    data = [f"--data.{name}={value}" for name, value in corpus_settings.items()]
    steps = ["--train.max_tokens=20480", "--eval.interval=5", "--eval.max_iters=2", "--train.log_interval=1"]
    assert main(["--config", str(ROOT / "configs" / "quickstart.yaml"), *data, *steps]) == 0
    final = tmp_path / "checkpoints" / "quickstart" / "final"
    assert check_export(final, cases / "quickstart") == "LitGPTMoEForCausalLM"
    pipe = pipeline("text-generation", str(cases / "quickstart" / "out"), trust_remote_code=True)
    (written,) = pipe("def parse(", max_new_tokens=4, do_sample=False)
    assert written["generated_text"].startswith("def parse(")


@pytest.mark.slow
def test_in_transformers_5(cases, request):
    """What the tests above have trained."""
    items = (item for item in request.session.items if item is not request.node)
    trained = [item for item in items if "cases" in item.fixturenames]
    if not trained:
        # It compares what others leave, and was asked for without them, as by `-k`.
        pytest.skip("nothing was trained: run the whole file")
    assert len(list(cases.iterdir())) == len(trained)
    compare(cases)


@pytest.mark.slow
def test_two_processes_accumulate_half_as_often(tmp_path):
    """gpt-moe-fineweb under torchrun: the same steps, tokens and losses as one process."""
    RAW_DATA["gpt-moe-fineweb"](tmp_path)
    for script, *arguments in preparations("gpt-moe-fineweb"):
        if script.endswith("tokenizer.py"):
            run(tmp_path, sys.executable, ROOT / script, *arguments)
    found = {}
    for processes in (1, 2):
        out_dir = tmp_path / f"out-{processes}"
        torchrun = [Path(sys.executable).parent / "torchrun", "--nproc_per_node", str(processes), "--standalone"]
        settings = [*overrides("gpt-moe-fineweb", 4), "--out_dir", out_dir, "--precision", "32-true"]
        script = [ROOT / "run_train.py", "--config", path_of("gpt-moe-fineweb")]
        settings += ["--train.micro_batch_size", "2", *LARGE_VOCABULARY["gpt-moe-fineweb"]]
        run(tmp_path, *torchrun, *script, *settings)
        found[processes] = losses(out_dir)
        tokens = losses(out_dir, "total_tokens")
        assert tokens == {step: step * BATCH * LENGTH for step in range(1, 5)}
    assert found[2] == pytest.approx(found[1], abs=2e-3)
