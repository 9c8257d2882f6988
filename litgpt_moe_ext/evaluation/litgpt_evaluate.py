"""`litgpt evaluate` for checkpoints and tasks that LitGPT's own command cannot handle.

LitGPT first converts a checkpoint to Hugging Face's format, which lacks the plugin's layers, and accepts only tasks
that lm-eval ships. Here the LitGPT model itself answers lm-eval's requests.
"""

import inspect
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch

from litgpt_moe_ext.cli.output import write_text
from litgpt_moe_ext.cli.paths import check_path
from litgpt_moe_ext.config.fields import added_fields, uses_plugin
from litgpt_moe_ext.errors import SettingsError, refuse_first
from litgpt_moe_ext.files.durable import is_stream
from litgpt_moe_ext.host.checkpoints import CONFIG_FILE, read_fields

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from litgpt_moe_ext.evaluation.harness.model import LitGPTModel


@dataclass(frozen=True)
class EvaluateSettings:
    """The flags of `litgpt evaluate`.

    Attributes:
        checkpoint_dir: Directory with `lit_model.pth`, `model_config.yaml` and tokenizer files.
        tasks: Comma separated task names of lm-eval and paths of YAML files in lm-eval's task format.
        out_dir: Directory of `results.json`, by default `checkpoint_dir`/evaluate.
        force_conversion: Has no effect, since nothing is converted.
        num_fewshot: Number of examples in the context; by default the task's own.
        batch_size: Requests per batch, "auto" for as many as fit, or "auto:N" to determine that N times.
        device: Where to run, by default "cuda" if available, else "cpu".
        dtype: Floating point type of the weights, by default the checkpoint's.
        limit: Number of documents per task, or their fraction if below 1.
        seed: Seed of Python's, NumPy's and torch's random numbers.
        save_filepath: File of the results, instead of `out_dir`/results.json.
        access_token: Has no effect, since nothing is downloaded from a model hub.
    """

    checkpoint_dir: Path
    tasks: str
    out_dir: Path | None = None
    force_conversion: bool = False
    num_fewshot: int | None = None
    batch_size: int | str = 1
    device: str | None = None
    dtype: str | torch.dtype | None = None
    limit: float | None = None
    seed: int = 1234
    save_filepath: Path | None = None
    access_token: str | None = None


def evaluate_checkpoint(settings: EvaluateSettings) -> None:
    """Evaluate a LitGPT checkpoint without conversion; print lm-eval's table and save all results as JSON.

    Args:
        settings: What to evaluate, and how.

    Raises:
        SettingsError: If a setting is malformed, a task unknown, the checkpoint, a task file or its data is missing, or
            there can be no directory for the results.
    """
    refuse_first(_wrong(settings))
    if settings.force_conversion:
        print("force_conversion: has no effect, the checkpoint is evaluated without converting it.")
    # Before importing lm-eval, which takes long: check the directory, and keep the tokenizers' threads from starting.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    checkpoint_dir = _resolve_checkpoint_dir(settings.checkpoint_dir)

    from litgpt_moe_ext.evaluation.loading import check_checkpoint_dir

    check_checkpoint_dir(checkpoint_dir)
    out_dir = Path(settings.out_dir or checkpoint_dir / "evaluate")
    if settings.save_filepath is None:
        check_path("out_dir", out_dir)
    else:
        check_path("save_filepath", Path(settings.save_filepath))

    from litgpt_moe_ext.evaluation.harness.model import LitGPTModel
    from litgpt_moe_ext.evaluation.harness.tasks import load_tasks

    loaded_tasks, task_manager = load_tasks(settings.tasks)
    model = LitGPTModel(checkpoint_dir, device=settings.device, dtype=settings.dtype, batch_size=settings.batch_size)
    info = model.get_model_info()
    print(
        f"Evaluating {checkpoint_dir} without conversion: {info['model_num_parameters']:,} parameters, "
        f"{info['model_dtype']}, {model.device}."
    )
    results = _evaluate(model, loaded_tasks, task_manager, settings)
    # lm-eval adds these only for Hugging Face models.
    results["config"].update(model=str(checkpoint_dir), **info)
    results.update(eot_token_id=model.eot_token_id, max_length=model.max_length)
    _report(results, Path(settings.save_filepath or out_dir / "results.json"))


def _wrong(settings: EvaluateSettings) -> Iterator[str]:
    limit, examples = settings.limit, settings.num_fewshot
    if limit is not None and not limit > 0:  # nan neither
        yield f"limit: {limit} must be a number of documents per task, or a fraction of them; leave it out for all"
    if examples is not None and examples < 0:
        yield f"num_fewshot: {examples} must be an integer of at least 0; leave it out for the task's own"


def _evaluate(
    model: "LitGPTModel", tasks: list[Any], task_manager: "TaskManager", settings: EvaluateSettings
) -> dict[str, Any]:
    from datasets.exceptions import DatasetsError
    from lm_eval.evaluator import simple_evaluate

    from litgpt_moe_ext.evaluation.harness.tasks import reason

    try:
        return simple_evaluate(
            model=model,
            tasks=tasks,
            task_manager=task_manager,
            num_fewshot=settings.num_fewshot,
            batch_size=settings.batch_size,
            device=str(model.device),
            limit=settings.limit,
            random_seed=settings.seed,
            numpy_random_seed=settings.seed,
            torch_random_seed=settings.seed,
        )
    except (ConnectionError, DatasetsError) as error:
        raise SettingsError(
            f"tasks: {settings.tasks!r} needs data that cannot be loaded: {reason(error)}; evaluate where the hub can "
            "be reached, or name a task file with data of your own"
        ) from error


def _resolve_checkpoint_dir(checkpoint_dir: Path | str) -> Path:
    # LitGPT lets users leave out the leading `checkpoints/`.
    from litgpt.utils import extend_checkpoint_dir

    return extend_checkpoint_dir(Path(checkpoint_dir))


def _report(results: dict[str, Any], save_filepath: Path) -> None:
    from litgpt.eval.evaluate import prepare_results

    # LitGPT's own function formats the results, so that the content is the same. Given a real file, it would leave it
    # open, and a full disk could cut off its end silently.
    text = io.StringIO()
    prepare_results(results, cast(Any, SimpleNamespace(open=lambda *_, **__: text)))
    write_text(save_filepath, text.getvalue())
    if not is_stream(save_filepath):
        print(f"Saved the results to {save_filepath}")


def wrap_convert_and_evaluate(original: Callable[..., None]) -> Callable[..., None]:
    """Extend LitGPT's `convert_and_evaluate` to the plugin's checkpoints and local task files.

    Args:
        original: LitGPT's function.

    Returns:
        A function with the same signature and documentation. It calls `evaluate_checkpoint` if the checkpoint's
        `model_config.yaml` names one of the plugin's layers or if `tasks` names a YAML file, and `original` with
        unchanged arguments otherwise.
    """
    signature = inspect.signature(original)

    @wraps(original)
    def convert_and_evaluate(*args: Any, **kwargs: Any) -> None:
        arguments = signature.bind(*args, **kwargs).arguments
        tasks = arguments.get("tasks")
        if tasks is not None and (_names_task_file(tasks) or _names_plugin_layer(arguments["checkpoint_dir"])):
            return evaluate_checkpoint(EvaluateSettings(**arguments))
        return original(*args, **kwargs)

    return convert_and_evaluate


def _names_task_file(tasks: str) -> bool:
    return any(entry.strip().lower().endswith((".yaml", ".yml")) for entry in tasks.split(","))


def _names_plugin_layer(checkpoint_dir: Path | str) -> bool:
    folder = _resolve_checkpoint_dir(checkpoint_dir)
    if not (folder / CONFIG_FILE).is_file():
        return False
    fields = read_fields(folder)
    names = {name: fields.get(name) for name in ("mlp_class_name", *added_fields())}
    return uses_plugin(cast(Any, SimpleNamespace(**names)))
