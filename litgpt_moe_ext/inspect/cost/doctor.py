"""Whether this installation can run a recipe: what is there, and what it means.

Each check is a function of what it looks at; none of them trains, downloads or compiles anything.
"""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.files.durable import refusal
from litgpt_moe_ext.inspect.recipes import Recipe
from litgpt_moe_ext.recipe_files import is_trusted
from litgpt_moe_ext.wording import counted

if TYPE_CHECKING:
    import torch

    from litgpt_moe_ext.config.types import Config
    from litgpt_moe_ext.training.plan import Plan
    from litgpt_moe_ext.training.settings import Settings, StrategyName

Verdict = Literal["good", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the page.

    Attributes:
        topic: What was looked at.
        verdict: `problem` keeps the recipe from running; `note` is worth knowing.
        text: What was found, and what it means.
    """

    topic: str
    verdict: Verdict
    text: str


def examine(recipe: Recipe | None, settings: "Settings | SettingsError | None" = None) -> list[Finding]:
    """Look at the installation, and at what a recipe asks of it.

    Args:
        recipe: The recipe; None looks at the installation alone.
        settings: The same as a run reads it, for the checks with which it begins, or what the run would say.
    """
    from litgpt_moe_ext.training.parallel.accelerator import accelerator_here

    findings = [*_versions(), *_device(), *_links(), _compile(recipe)]
    findings += [*(_kernels_here() if recipe is None else _kernels(recipe)), _precision(recipe)]
    if recipe is not None:
        findings += [_unread(recipe.checkpoint)] if recipe.checkpoint else []
        findings += [] if settings is None else _settings(recipe, settings)
        findings += [_strategy(recipe), graphs(recipe, accelerator_here()), *_memory(recipe), _data(recipe)]
        findings += [*_tokenizer(recipe, findings), *([] if recipe.checkpoint else _out_dir(recipe)), _disk(recipe)]
    once: dict[str, Finding] = {}
    for finding in findings:  # a kernel that is not there is in the way of counting memory as well
        once.setdefault(finding.text, finding)
    return list(once.values())


def _versions() -> Iterator[Finding]:
    from litgpt_moe_ext.host.seams import TESTED_LITGPT

    names = ("litgpt-moe-ext", "litgpt", "torch", "lightning", "transformers", "lm-eval")
    found = ", ".join(f"{name} {_version(name)}" for name in names)
    yield Finding("versions", "good", f"Python {platform.python_version()}, {found}")
    if _version("litgpt") != TESTED_LITGPT:
        text = (
            f"litgpt {_version('litgpt')} is installed; tested is {TESTED_LITGPT}: pip install litgpt=={TESTED_LITGPT}"
        )
        yield Finding("litgpt", "note", text)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _device() -> Iterator[Finding]:
    import psutil
    import torch

    memory = psutil.virtual_memory()
    capability = torch.backends.cpu.get_cpu_capability()
    yield Finding(
        "CPU",
        "good",
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {capability}, "
        f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB of memory free",
    )
    if not torch.cuda.is_available():
        built = (
            f"torch was built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch was built without CUDA"
        )
        yield Finding("GPU", "note", f"none that torch can use ({built}); everything runs on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield Finding(
            f"GPU {index}",
            "good",
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB",
        )


def links(matrix: str | None) -> list[Finding]:
    """Return what the connections of several GPUs mean for training on them.

    Args:
        matrix: What `nvidia-smi topo -m` prints; None where it does not run.
    """
    from litgpt_moe_ext.training.parallel import topology

    return [Finding("links", "note", line) for line in topology.report(matrix or "")]


def _links() -> list[Finding]:
    import torch

    from litgpt_moe_ext.training.parallel import topology

    return links(topology.read_matrix()) if torch.cuda.device_count() > 1 else []


def _compile(recipe: Recipe | None) -> Finding:
    from litgpt_moe_ext.training.compilation import decide, obstacle, probe_platform
    from litgpt_moe_ext.training.parallel.accelerator import accelerator_here

    found = probe_platform(accelerator_here())
    if recipe is None:
        reason = obstacle(found)
        text = "torch.compile cannot work: " + reason if reason else "torch.compile has the compiler it needs"
        return Finding("compile", "note" if reason else "good", text)
    setting = recipe.settings.get("compile", "auto")
    if setting is True and (reason := obstacle(found)):
        return Finding("compile", "problem", f"compile: true cannot work here: {reason}; set compile: auto")
    return Finding("compile", "good", str(decide(setting, recipe.config, found)))


def _kernels_here() -> Iterator[Finding]:
    """Yield which kernels models of usual sizes would get."""
    import torch

    from litgpt_moe_ext.attention.kernels.choice import capability_of, choose
    from litgpt_moe_ext.attention.kernels.registry import EAGER, Workload
    from litgpt_moe_ext.kernels.gpu import vendor_kind
    from litgpt_moe_ext.moe.kernels.choice import backend_for

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if cuda else (torch.float32,)
    names = {dtype: str(dtype).removeprefix("torch.") for dtype in dtypes}
    chosen = {name: backend_for(device, dtype, (64, 64)) for dtype, name in names.items()}
    text = ", ".join(f"backend {backend} for {name}" for name, backend in chosen.items())
    yield Finding("experts", "note" if "loop" in chosen.values() else "good", text)
    capability = capability_of(device)
    chosen = {
        name: choose(Workload(vendor_kind(device), capability, name, 64, ("gradient",))) for name in names.values()
    }
    text = ", ".join(f"kernel {kernel} for {name}" for name, kernel in chosen.items())
    yield Finding("attention", "note" if EAGER in chosen.values() else "good", f"{text}, with sinks")


def _kernels(recipe: Recipe) -> Iterator[Finding]:
    """Yield what a run of the recipe would say about its kernels, or what it would refuse."""
    from litgpt_moe_ext.attention.kernels.registry import EAGER
    from litgpt_moe_ext.meta.models import meta_model
    from litgpt_moe_ext.training.callbacks.kernel_report import attention_line, experts_line

    device, dtype, autocast = _computing(recipe)
    model, compiled = meta_model(recipe.config).to(dtype), _compiles(recipe, device.type)
    lines = {
        "experts": (lambda: experts_line(model, device, compiled), "loop", "LitGPT's own layers"),
        "attention": (lambda: attention_line(model, device), EAGER, "LitGPT's own"),
    }
    for topic, (line_of, slowest, none) in lines.items():
        try:
            with autocast:
                line = line_of()
        except SettingsError as error:
            yield Finding(topic, "problem", str(error))
            continue
        text = none if line is None else line.removeprefix(f"{topic}: ")
        yield Finding(topic, "note" if text.startswith(slowest) else "good", text)


def _precision(recipe: Recipe | None) -> Finding:
    import torch

    from litgpt_moe_ext.training.parallel.accelerator import default_precision

    if torch.cuda.is_available():
        usable = [
            "32-true",
            "16-mixed",
            *(["bf16-mixed", "bf16-true"] if default_precision("cuda") == "bf16-mixed" else []),
        ]
    else:
        usable = ["32-true", "16-mixed", "bf16-mixed", "bf16-true"]
    wanted = None if recipe is None else recipe.settings.get("precision")
    if wanted is not None and wanted not in usable:
        return Finding(
            "precision", "problem", f"precision: {wanted} does not work on this device; use one of {', '.join(usable)}"
        )
    slow = not torch.cuda.is_available() and not torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "AMX"))
    if slow and wanted is not None and wanted.startswith("bf16"):
        return Finding("precision", "note", f"precision: {wanted} is slow on a CPU without AVX-512; 32-true is faster")
    return Finding("precision", "good", f"{wanted or 'chosen by the device'}; usable: {', '.join(usable)}")


def _unread(checkpoint: Path) -> Finding:
    file = checkpoint / "hyperparameters.yaml"
    return Finding(
        "settings", "note", f"a checkpoint's are data, and nothing is made of them; `doctor {file}` does that"
    )


def _settings(recipe: Recipe, settings: "Settings | SettingsError") -> Iterator[Finding]:
    from litgpt_moe_ext.config.features import unlearned_routers
    from litgpt_moe_ext.training.checks import check_batch, check_data, check_whole_model, offers
    from litgpt_moe_ext.training.parallel.accelerator import accelerator_here
    from litgpt_moe_ext.training.plan import check_plan

    if isinstance(settings, SettingsError):
        yield Finding("settings", "problem", str(settings))
        return
    try:
        plan = check_plan(settings)
        check_batch(recipe.global_batch_size, recipe.micro_batch_size, _processes(recipe) * recipe.num_nodes)
        check_whole_model(plan.settings, _whole(recipe), _compiles(recipe, accelerator_here()))
        check_data(plan.settings, plan.config)
        data: Any = plan.settings.data
        if offers(data, "check_shards") and data.data_path.is_dir():
            data.check_shards()
        source = getattr(data, "source_path", None)
        if offers(data, "check_sources") and (source is None or source.exists()):  # or else the data have a problem
            data.check_sources()
    except SettingsError as error:
        yield Finding("settings", "problem", str(error))
        return
    yield Finding("settings", "good", "they go together")
    if note := unlearned_routers(cast("Config", plan.config)):
        yield Finding("routers", "note", note)
    yield from _start(plan)


def _start(plan: "Plan") -> Iterator[Finding]:
    from litgpt_moe_ext.training.start import choose_checkpoint

    initial = plan.settings.initial_checkpoint_dir
    if plan.settings.resume is False and initial is None:
        return
    passed_over: list[str] = []
    try:
        found = choose_checkpoint(plan, passed_over.append, read_all=False)
    except (OSError, SettingsError) as error:
        yield Finding("start", "problem", str(error))
        return
    yield from (Finding("start", "note", line) for line in passed_over)
    unread = "nothing of it is missing, and the start compares its numbers with their checksums"
    if found is not None:
        yield Finding("start", "good", f"goes on from {found.parent}: {unread}")
    elif initial is not None:
        yield Finding("start", "good", f"with the weights of {initial}: {unread}")
    else:
        yield Finding("start", "good", f"anew: there is nothing to resume in {plan.out_dir}")


def _compiles(recipe: Recipe, device_type: str) -> bool:
    from litgpt_moe_ext.training.compilation import decide, probe_platform

    return decide(recipe.settings.get("compile", "auto"), recipe.config, probe_platform(device_type)).enabled


def _computing(recipe: Recipe) -> "tuple[torch.device, torch.dtype, torch.autocast]":
    """Return where a run of the recipe computes, the type of its weights, and its autocast."""
    import torch

    from litgpt_moe_ext.inspect.cost.memory import PRECISIONS
    from litgpt_moe_ext.training.parallel.accelerator import accelerator_here, default_precision

    accelerator = accelerator_here()
    usual = default_precision(accelerator)
    # What is no precision is a problem of the settings.
    dtype, autocast = PRECISIONS.get(recipe.precision or usual, PRECISIONS[usual])
    return torch.device(accelerator), dtype, torch.autocast(accelerator, autocast, enabled=autocast is not None)


def _processes(recipe: Recipe) -> int:
    import torch

    return recipe.devices or torch.cuda.device_count() or 1


def _whole(recipe: Recipe) -> bool:
    # Whether every process has all weights.
    from litgpt_moe_ext.training.parallel.facts import facts_of

    return facts_of(recipe.strategy).holds_whole_model(_processes(recipe) * recipe.num_nodes)


def _strategy(recipe: Recipe) -> Finding:
    import torch

    from litgpt_moe_ext.training.checks import check_strategy, single_process_note
    from litgpt_moe_ext.training.parallel.accelerator import accelerator_here
    from litgpt_moe_ext.training.settings import DistributedArgs

    per_node, nodes = _processes(recipe), recipe.num_nodes
    try:
        args = DistributedArgs(**(recipe.settings.get("distributed") or {}))
        check_strategy(recipe.strategy, args, accelerator_here())
    except (TypeError, ValueError, ImportError) as error:
        return Finding("strategy", "problem", str(error))
    if torch.cuda.is_available() and per_node > torch.cuda.device_count():
        text = f"devices: {per_node}, but torch can use {counted(torch.cuda.device_count(), 'GPU')} here"
        return Finding("strategy", "problem", f"{text}; set devices: auto")
    if note := single_process_note(cast("StrategyName", recipe.strategy), per_node * nodes, args):
        return Finding("strategy", "note", note)
    name = "ddp" if recipe.strategy == "auto" and per_node * nodes > 1 else recipe.strategy
    count = counted(per_node, "process") + (f" on each of {nodes} nodes" if nodes > 1 else "")
    return Finding("strategy", "good", f"{name}, {count}")


def graphs(recipe: Recipe, device_type: str) -> Finding:
    """Return whether passes will run as CUDA graphs.

    Args:
        recipe: The recipe.
        device_type: Where it runs.
    """
    from litgpt_moe_ext.training.parallel.facts import STRATEGIES
    from litgpt_moe_ext.training.steps.cuda_graphs import Conditions, decide

    strategy = STRATEGIES.get(recipe.strategy, STRATEGIES["auto"])  # an unknown one is a problem of its own
    processes = _processes(recipe) * recipe.num_nodes
    checkpointing = recipe.memory_savers["activation_checkpointing"]
    compiled = _compiles(recipe, device_type)
    conditions = Conditions(device_type, strategy, processes, compiled, checkpointing, recipe.config)
    try:
        decision = decide(recipe.settings.get("cuda_graphs", "auto"), conditions)
    except SettingsError as error:
        return Finding("CUDA graphs", "problem", str(error))
    return Finding("CUDA graphs", "good", str(decision).removeprefix("CUDA graphs: "))


def _memory(recipe: Recipe) -> Iterator[Finding]:
    import psutil
    import torch

    from litgpt_moe_ext.inspect.cost.layers import shorten
    from litgpt_moe_ext.inspect.cost.memory import PRECISIONS, graph_memory, training_memory
    from litgpt_moe_ext.inspect.cost.sharding import block_sizes, process_memory
    from litgpt_moe_ext.training.parallel.accelerator import accelerator_here, default_precision

    cuda = torch.cuda.is_available()
    precision = recipe.precision or default_precision(accelerator_here())
    if precision not in PRECISIONS or recipe.sequence_length > recipe.config.block_size:
        return  # problems of their own
    per_node = _processes(recipe)
    knobs = recipe.settings.get("distributed") or {}
    offload = bool(knobs.get("cpu_offload") or knobs.get("offload_optimizer"))
    try:
        short = shorten(recipe.config)
        whole = training_memory(short, recipe.step(precision))
        sizes = block_sizes(short, PRECISIONS[precision][0].itemsize)
        one = process_memory(whole, sizes, recipe.strategy, per_node, recipe.num_nodes, offload)
    except (ImportError, ValueError) as error:
        yield Finding("memory", "problem", str(error))
        return
    # On a CPU all processes of a node share one memory.
    needed = one.total - one.host if cuda else per_node * one.total
    free = torch.cuda.mem_get_info()[0] if cuda else psutil.virtual_memory().available
    among = " on each GPU" if cuda and per_node > 1 else f" in {per_node} processes" if per_node > 1 else ""
    text = f"training in {precision} takes about {needed / 2**30:.2f} GiB of tensors{among}"
    text += f", {free / 2**30:.1f} GiB are free"
    if cuda and per_node * recipe.num_nodes == 1:
        text += f"; CUDA graphs, where tried, want {graph_memory(short, whole, precision) / 2**30:.2f} more"
    if needed > free:
        yield Finding("memory", "problem", f"{text}; {'; '.join(_remedies(recipe, cuda))}")
    else:
        yield Finding("memory", "good", text)


def _remedies(recipe: Recipe, cuda: bool) -> Iterator[str]:
    from litgpt_moe_ext.inspect.cost.memory import fusing_choices

    savers = recipe.memory_savers
    yield f"lower train.micro_batch_size ({recipe.micro_batch_size})"
    if savers["activation_checkpointing"] != "full":
        yield f"set activation_checkpointing ({savers['activation_checkpointing']}) to full"
    whole = _whole(recipe)
    if whole and not savers["fused_cross_entropy"] and True in fusing_choices(recipe.config):
        yield "set fused_cross_entropy to true"
    if cuda and whole:
        yield "share the model among several GPUs with strategy: fsdp2"


def _data(recipe: Recipe) -> Finding:
    from litgpt_moe_ext.data import import_path

    data = recipe.settings.get("data")
    if not data:
        return Finding("data", "note", "the recipe names none; LitGPT's default is TinyLlama, which must be there")
    class_path = import_path(data if isinstance(data, str) else data.get("class_path", ""))
    if recipe.checkpoint and not is_trusted(class_path):
        return Finding("data", "note", f"{class_path}, which is not imported for a checkpoint")
    module, _, name = class_path.rpartition(".")
    try:
        made = getattr(importlib.import_module(module or "litgpt.data"), name)
    except (ImportError, AttributeError) as error:
        return Finding("data", "problem", f"data.class_path: {class_path!r} cannot be imported: {error}")
    arguments = {} if isinstance(data, str) else data.get("init_args") or {}
    # Whatever is no text is a problem of the settings.
    arguments = {name: value for name, value in arguments.items() if isinstance(value, str)}
    for name in ("source_path", "tokenizer_dir"):
        if (source := arguments.get(name)) is not None and not Path(source).exists():
            return Finding("data", "problem", f"data.init_args.{name}: {source!r} must exist")
    path = arguments.get("data_path")
    if path is not None and not (Path(path).is_dir() and any(Path(path).iterdir())):
        if hasattr(made, "find_shards"):
            return Finding("data", "problem", f"data.init_args.data_path: {path!r} must be a folder of token shards")
        if not recipe.checkpoint and (reason := refusal(_existing(Path(path)))) is not None:
            text = f"data.init_args.data_path: {path!r} must be a folder in which the data can be prepared ({reason})"
            return Finding("data", "problem", text)
        return Finding("data", "note", f"{class_path}; nothing in {path!r} yet, the run will prepare it")
    return Finding("data", "good", class_path + (f" in {path!r}" if path is not None else ""))


def _tokenizer(recipe: Recipe, found: list[Finding]) -> Iterator[Finding]:
    from litgpt_moe_ext.training.checks import open_tokenizer

    directory = recipe.settings.get("tokenizer_dir")
    if directory is None:
        # Theirs may be what the settings or the data have a problem with.
        if not any(finding.verdict == "problem" and finding.topic in ("settings", "data") for finding in found):
            yield Finding("tokenizer", "good", "that of the data, if they have one")
    elif Path(directory).is_dir():  # or else the settings have a problem
        try:
            open_tokenizer(Path(directory), recipe.config.padded_vocab_size or 0)
        except (OSError, ValueError) as error:
            yield Finding("tokenizer", "problem", str(error))
        else:
            yield Finding("tokenizer", "good", f"{directory} opens and fits the vocabulary")


def _existing(path: Path, is_there: Callable[[Path], bool] = os.path.lexists) -> Path:
    # The path, or if nothing is there, not even a link to nothing, the innermost folder on the way to it.
    return next(place for place in (path.absolute(), *path.absolute().parents) if is_there(place))


def _out_dir_of(recipe: Recipe) -> Path:
    return Path(recipe.settings.get("out_dir") or "out/pretrain")


def _out_dir(recipe: Recipe) -> Iterator[Finding]:
    from litgpt_moe_ext.training.checks import check_own

    out_dir = _out_dir_of(recipe)
    try:
        check_own(out_dir)
    except SettingsError as error:
        yield Finding("out_dir", "problem", str(error))
    if (reason := refusal(_existing(out_dir))) is not None:
        text = f"out_dir: {str(out_dir)!r} must be a directory in which directories can be made ({reason})"
        yield Finding("out_dir", "problem", f"{text}; choose another --out_dir")


def _disk(recipe: Recipe) -> Finding:
    from litgpt_moe_ext.inspect.cost.memory import state_ratio
    from litgpt_moe_ext.model_size import count_parameters

    existing = _existing(_out_dir_of(recipe), os.path.exists)
    free = shutil.disk_usage(existing).free
    _, dtype, _ = _computing(recipe)
    try:
        remembered = state_ratio(recipe.optimizer, dtype)
    except SettingsError:  # a problem of its own
        remembered = 2
    # Parameters and what the optimizer remembers of each, and an average of the weights in float32.
    size = dtype.itemsize * (1 + remembered) + (4 if recipe.averages else 0)
    checkpoint = size * count_parameters(recipe.config, recipe.tie_embeddings).total
    text = (
        f"a training checkpoint takes about {checkpoint / 2**30:.2f} GiB, {free / 2**30:.1f} GiB are free in {existing}"
    )
    if free < 2 * checkpoint:
        return Finding("disk", "problem", f"{text}; two must fit, since one is written before another goes")
    return Finding("disk", "good", text)
