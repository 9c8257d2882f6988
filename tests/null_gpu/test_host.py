"""What the host of a GPU does, seen on one that is not there: what it starts, and what it waits for."""

import json
import re
import sys

import pytest
import yaml

from tests import null_gpu
from tests.fake_cuda import RECIPES
from tests.models import moe_config
from tests.moe.test_launches import LAYERS, launches_of_layer
from tests.runs import run_command
from tools import on_a_card

pytestmark = pytest.mark.slow


def counted(gpu, capability, layers):
    """Return what `tests/null_gpu/count.py` counts of layers, each given as settings and whether there is padding."""
    environment = null_gpu.environment(gpu, capability)
    ended = run_command(sys.executable, "-m", "tests.null_gpu.count", stdin=json.dumps(layers), **environment)
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize("capability", [86, 90])
def test_layers_start_what_the_operators_say(gpu, capability):
    """Kernels that are started, against operators that are counted without a device; and nothing waits."""
    recipes = [yaml.safe_load(file.read_text(encoding="utf-8"))["model_config"] for file in RECIPES]
    layers = [(settings, False) for settings in recipes if settings.get("n_expert")]
    small = {"n_embd": 256, "moe_intermediate_size": 64}
    layers += [({**small, **settings}, padded) for settings in LAYERS.values() for padded in (False, True)]
    found = counted(gpu, capability, layers)
    for (settings, padded), layer in zip(layers, found, strict=True):
        operators = launches_of_layer(moe_config(**settings), divmod(capability, 10), padded=padded)
        # One of torch's kernels prepares its product, which is another.
        expected = len(operators) + operators.count("_grouped_mm")
        assert len(layer["forward"]) == expected, (settings, padded, layer["forward"], operators)
        assert layer["waited"] == 0


def test_a_step_of_muon_starts_few(gpu):
    """For the quickstart, whose 28 matrices and stacks of them have three pairs of sides; as a graph, all are one."""
    recipe = next(file for file in RECIPES if file.name == "quickstart.yaml")
    environment = null_gpu.environment(gpu, 86)
    ended = run_command(sys.executable, "-m", "tests.null_gpu.optimizer", str(recipe), **environment)
    found = json.loads(ended.stdout.splitlines()[-1])
    assert len(found["started"]) == 135, found["started"]
    assert found["waited"] == 0


def test_a_run_starts_four_graphs_per_step(gpu, tmp_path):
    """Of the quickstart, by the command line: both passes, clipping and Muon, which are hundreds of launches without.

    The host waits for the norm of the gradients, which decides whether the step is taken. Batches of a validation are
    one graph each.
    """
    recipe = next(file for file in RECIPES if file.name == "quickstart.yaml")
    shorter = ["--train.max_steps", "8", "--eval.final_validation", "false", "--sample.prompts", "[]"]
    # Weights that are no numbers could not be saved.
    shorter += ["--eval.interval", "3", "--eval.max_iters", "5", "--checkpoint.best", "false"]
    command = ["-m", "tests.null_gpu.steps", "--config", recipe, "--out_dir", tmp_path / "run"]
    command += ["--data.data_path", tmp_path / "data", *shorter]
    ended = run_command(sys.executable, *map(str, command), timeout=None, **null_gpu.environment(gpu, 89))
    steps = json.loads(ended.stdout.splitlines()[-1])
    first, *_, last = ({"starts": len(step["started"]), "waits": step["waited"]} for step in steps)
    assert first["starts"] > 400
    assert last == {"starts": 22, "waits": 1}, steps[-1]
    assert steps[-1]["started"].count("graph") == 4
    assert [len(step["started"]) for step in steps[-4:]] == [22, 22, 89, 22]
    assert steps[-2]["started"].count("graph") == 4 + 5


@pytest.mark.parametrize("schedule", [None, {"warmup_steps": 9, "decay_start": 99}], ids=["rate", "schedule"])
def test_the_biases_of_all_layers_move_in_two(gpu, schedule):
    """Those of the quickstart, which has four: the counts of all are put together, and one kernel does the rest."""
    recipe = next(file for file in RECIPES if file.name == "quickstart.yaml")
    settings = yaml.safe_load(recipe.read_text(encoding="utf-8"))["model_config"]
    settings["router_bias_update_schedule"] = schedule
    command = (sys.executable, "-m", "tests.null_gpu.balancing")
    ended = run_command(*command, stdin=json.dumps(settings), **null_gpu.environment(gpu, 86))
    moving, logging = json.loads(ended.stdout.splitlines()[-1]).values()
    assert len(moving["started"]) == 2, moving["started"]
    assert moving["started"][1] == "_move"
    assert moving["waited"] == 0
    # However many layers there are: the records, the biases, their cast, both, and one transfer.
    assert len(logging["started"]) == 5, logging["started"]
    assert logging["waited"] == 1


def test_the_benchmark_measures_steps_as_graphs(gpu, tmp_path):
    """Which a CPU does not have; what fails is only noted there."""
    command = (
        sys.executable,
        "benchmarks/gpu.py",
        "--tiny",
        "--only",
        "steps",
        "--out",
        str(tmp_path / "figures.json"),
    )
    ended = run_command(*command, timeout=None, **null_gpu.environment(gpu, 89))
    apart = [f"ours, graphs, {without}" for without in ("unshared", "one stream", "passes only")]
    for model in ("dense twin, graphs", "ours, graphs", *apart):
        assert f"| quickstart | 1 x 1 x 64 | {model} |" in ended.stdout
    assert "CUDA graphs: not for" not in ended.stdout


def test_blocks_are_measured_by_the_command(gpu, tmp_path):
    """In the order of the products of a step, added gradients last; without numbers no block is faster."""
    recipe = yaml.safe_load(next(file for file in RECIPES if file.name == "quickstart.yaml").read_text("utf-8"))
    recipe["train"] |= {"micro_batch_size": 4}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    # Those of the tables and their neighbours only, because each is compiled.
    fewer = "from litgpt_moe_ext.inspect import tuning; tuning._first_tried = lambda work: []"
    program = f"{fewer}; import sys; from litgpt_moe_ext.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = ("-c", program, "tune", str(tmp_path / "recipe.yaml"))
    figures = tmp_path / "blocks-quickstart.json"
    environment = null_gpu.environment(gpu, 86) | {"XDG_CACHE_HOME": str(tmp_path)}
    ended = run_command(sys.executable, *command, "--json", str(figures), timeout=None, **environment)
    assert "null GPU, micro-batches of 4 x 256 tokens" in ended.stdout
    works = [product["work"] for product in json.loads(figures.read_text("utf-8"))["products"]]
    table = on_a_card.blocks(tmp_path, "quickstart")
    assert table["title"] == "Blocks of quickstart, micro-batches of 4 x 256 tokens"
    assert len(table["rows"]) == len(works)
    assert table["rows"][0]["product"] == "4096 tokens of 128 to 128"
    assert [(work["n_in"], work["n_out"]) for work in works[:4]] == [(128, 128), (64, 128), (128, 64), (128, 128)]
    assert [work["add"] for work in works[4:]] == [False, False, True, True]
    assert {(work["n_expert"], work["n_row"], work["precision"]) for work in works} == {(16, 4096, "half")}


@pytest.mark.parametrize(
    ("lacking", "said"),
    [
        ({"PATH": "/nowhere"}, "Triton needs a C compiler, and there is none; install gcc, or name one in CC"),
        ({"TRITON_CACHE_DIR": "/proc/none"}, "Triton cannot keep what it compiles (/proc/none: "),
    ],
)
def test_where_triton_cannot_be_set_up(gpu, tmp_path, lacking, said):
    """As in a slim container: the loop computes the experts, and `doctor` says why."""
    environment = null_gpu.environment(gpu, 86) | {"TRITON_CACHE_DIR": str(tmp_path)} | lacking
    output = run_command(sys.executable, "-m", "litgpt_moe_ext", "doctor", **environment).stdout
    (line,) = (line for line in output.splitlines() if line.split()[1:2] == ["experts"])
    assert line.split()[0] == "note"
    assert f"triton cannot be used because {said}" in line


def test_a_card_that_torch_has_no_kernels_for(gpu, recipe):
    """Its memory can be used, so that only the first kernel fails: in the middle of a run, if nothing asks before."""
    environment = null_gpu.environment(gpu, 61)
    command = (sys.executable, "-m", "litgpt_moe_ext")
    reason = "no kernel image is available for execution on the device"
    refused = run_command(*command, "train", "--config", recipe(), status=2, **environment).stderr
    assert f"error: devices: 'cuda:0' does not work here (CUDA error: {reason}); `litgpt-moe doctor` says" in refused
    page = run_command(*command, "doctor", status=1, **environment).stdout
    (line,) = (line for line in page.splitlines() if line.split()[1:3] == ["GPU", "0"])
    assert re.search(f"^PROBLEM .* does not work: CUDA error: {reason} .torch .* has kernels for sm_75, ", line)
