"""LitGPT's commands on checkpoints of the plugin: one is made to work, the others say why they cannot."""

import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from litgpt_moe_ext.config.features import MLP_CLASS_NAMES, MOE_CLASS_NAMES
from litgpt_moe_ext.config.fields import uses_plugin
from litgpt_moe_ext.errors import (
    WRONG_SETTING,
    SettingsError,
    did_you_mean_inside,
    how_to_import,
    in_shards,
    one_line,
    refuse_first,
    undecoded,
)
from litgpt_moe_ext.host.checkpoints import CONFIG_FILE, WEIGHTS_FILE
from litgpt_moe_ext.host.replaced import wrapping
from litgpt_moe_ext.wording import in_shell, quoted


class NoCheckpointError(SettingsError, FileNotFoundError):
    """There is no checkpoint in a directory; LitGPT's own callers expect a FileNotFoundError."""


def refuse_mlp_classes(module: ModuleType) -> None:
    """Say that a finetuning method supports only LitGPT's own layers."""

    def __getattr__(name: str) -> type:
        if name in MLP_CLASS_NAMES:
            raise SettingsError(
                f"mlp_class_name: {name} cannot be finetuned with {module.__name__}, which knows LitGPT's own layers "
                "only. Finetune all weights instead (litgpt finetune_full)."
            )
        raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

    vars(module)["__getattr__"] = __getattr__


def refuse_division(module: Any) -> None:
    """Say which of a model's layers `litgpt generate_tp` cannot divide; it supports only LitGPT's own."""

    @wrapping(module, "tensor_parallel")
    def tensor_parallel(original: Any, fabric: Any, model: Any) -> Any:
        refuse_first(_undivided(model))
        return original(fabric, model)


def refuse_division_first(module: Any) -> None:
    """Say so before `litgpt generate_tp` starts processes, of which the others would wait for the first in vain."""

    @wrapping(module, "main")
    def main(original: Any, checkpoint_dir: Path, *args: Any, **kwargs: Any) -> None:
        config = config_in(checkpoint_dir)
        if config is not None and uses_plugin(config):
            from litgpt_moe_ext.meta.models import meta_model

            refuse_first(_undivided(meta_model(config)))
        original(checkpoint_dir, *args, **kwargs)


def _undivided(model: Any) -> Iterator[str]:
    config, block = model.config, model.transformer.h[0]
    whole = {
        "mlp_class_name": config.mlp_class_name in MOE_CLASS_NAMES,
        "mlp_activation": config.mlp_class_name == "FeedForward" and not hasattr(block.mlp, "fc_1"),
        "attention_sinks": any(name.endswith("attn.sinks") for name, _ in model.named_parameters()),
    }
    for name in (name for name, is_whole in whole.items() if is_whole):
        yield (
            f"{name}: {getattr(config, name)} cannot be divided among GPUs by litgpt generate_tp, which knows "
            "LitGPT's own layers only. Generate with litgpt generate, or litgpt generate_sequentially."
        )


def require_weights_alone(
    function: str = "main", setting: str = "checkpoint_dir", instead: str | None = None
) -> Callable[[Any], None]:
    """Return what refuses a training checkpoint, in one line, where LitGPT expects a file of weights alone.

    Args:
        function: The function of a module of LitGPT that is given the checkpoint.
        setting: Its argument; None in it is no checkpoint.
        instead: A command that takes both kinds.
    """

    def refuse_others(module: Any) -> None:
        @wrapping(module, function)
        def checked(original: Any, *args: Any, **kwargs: Any) -> Any:
            checkpoint_dir = inspect.signature(original).bind(*args, **kwargs).arguments.get(setting)
            if checkpoint_dir is not None:
                _refuse_training_checkpoint(setting, checkpoint_dir, instead)
            return original(*args, **kwargs)

    return refuse_others


def require_response_mark(module: Any) -> None:
    """Refuse prompts without the words after which LitGPT prints; it would fail after it has generated."""
    mark = "### Response:"

    @wrapping(module, "main")
    def main(original: Any, checkpoint_dir: Path, *args: Any, **kwargs: Any) -> None:
        from litgpt.prompts import PromptStyle, has_prompt_style, load_prompt_style
        from litgpt.utils import extend_checkpoint_dir

        config, found = config_in(checkpoint_dir), extend_checkpoint_dir(Path(checkpoint_dir))
        if config is not None and uses_plugin(config):
            style = load_prompt_style(found) if has_prompt_style(found) else PromptStyle.from_config(config)
            if mark not in style.apply("", sys_prompt=None, input=""):
                raise SettingsError(
                    f"checkpoint_dir: prompts of {quoted(checkpoint_dir)} ({type(style).__name__}) have no {mark!r}, "
                    "after which this command prints; copy the prompt_style.yaml there that finetuning wrote"
                )
        original(checkpoint_dir, *args, **kwargs)


def require_weights_to_start(pretrain: Any) -> None:
    """Do the same where plain `litgpt pretrain` starts from weights; this package's training accepts both kinds."""

    @wrapping(pretrain, "main")
    def main(original: Any, *args: Any, **kwargs: Any) -> Any:
        from lightning import Fabric

        given = inspect.signature(original).bind(*args, **kwargs).arguments
        checkpoint_dir = given.get("initial_checkpoint_dir")
        if checkpoint_dir and type(given["fabric"]).load_raw is Fabric.load_raw:
            _refuse_training_checkpoint("initial_checkpoint_dir", checkpoint_dir, "litgpt-moe train")
        return original(*args, **kwargs)


def refuse_before_data(finetune: Any) -> None:
    """Name layers that a way of finetuning cannot take before it downloads and prepares data."""

    @wrapping(finetune, "main")
    def main(original: Any, *args: Any, **kwargs: Any) -> Any:
        config = inspect.signature(original).bind(*args, **kwargs).arguments["config"]
        if uses_plugin(config):
            import torch

            with torch.device("meta"):
                finetune.GPT(config)
        return original(*args, **kwargs)


def _refuse_training_checkpoint(setting: str, checkpoint_dir: Path, instead: str | None = None) -> None:
    from litgpt.utils import extend_checkpoint_dir

    from litgpt_moe_ext.files.archives import open_archive

    file = extend_checkpoint_dir(Path(checkpoint_dir)) / WEIGHTS_FILE
    if file.is_file() and "model" in open_archive(file, setting):
        command = in_shell("litgpt", "convert_pretrained_checkpoint", checkpoint_dir, "OUTPUT_DIR")
        raise SettingsError(
            f"{setting}: {quoted(checkpoint_dir)} is a training checkpoint, but this command needs the weights alone; "
            f"write them with `{command}`" + (f", or use {instead}, which takes both" if instead else "")
        )


def refuse_to_generate_nothing(module: Any) -> None:
    """Refuse, in one line, an empty prompt (where its tokenizer puts no token first), and no tokens to choose."""

    @wrapping(module, "generate_fn")
    def generate_fn(original: Any, model: Any, prompt: Any, max_returned_tokens: int, *args: Any, **kwargs: Any) -> Any:
        if uses_plugin(model.config):
            refuse_first(_nothing(prompt.size(0), max_returned_tokens, kwargs.get("top_k")))
        return original(model, prompt, max_returned_tokens, *args, **kwargs)


def _nothing(prompt: int, returned: int, top_k: int | None) -> Iterator[str]:
    if prompt == 0:
        yield "prompt: '' has no tokens to continue from; give some text"
    if returned <= prompt:
        yield f"max_new_tokens: {returned - prompt} must be at least 1"
    if top_k is not None and top_k < 1:
        yield f"top_k: {top_k} must be at least 1"


def end_chat_with_its_input(module: Any) -> None:
    """End a chat at the end of its input (Ctrl-D) as at Ctrl-C."""

    @wrapping(module, "interact")
    def interact(original: Any, *args: Any, **kwargs: Any) -> None:
        try:
            original(*args, **kwargs)
        except EOFError:
            if not uses_plugin(inspect.signature(original).bind(*args, **kwargs).arguments["model"].config):
                raise
            print()


def name_checkpoints(utils: Any) -> None:
    """Name the checkpoint inside a run's folder, and refuse, in one line, folders without one."""

    @wrapping(utils, "check_valid_checkpoint_dir")
    def check_valid_checkpoint_dir(
        original: Any, checkpoint_dir: Path, model_filename: str = WEIGHTS_FILE, *args: Any, **kwargs: Any
    ) -> None:
        _refuse_neighbours(checkpoint_dir, model_filename)
        try:
            original(checkpoint_dir, model_filename, *args, **kwargs)
        except FileNotFoundError as error:
            raise NoCheckpointError(one_line(error).replace("checkpoint_dir", "checkpoint_dir:", 1)) from error


def refuse_cut_off_weights(utils: Any) -> None:
    """Refuse, in one line, weights whose file lacks its end; LitGPT names neither the file nor a remedy."""

    @wrapping(utils, "load_checkpoint")
    def load_checkpoint(original: Any, fabric: Any, model: Any, checkpoint_path: Path, *args: Any, **more: Any) -> None:
        from litgpt_moe_ext.files.archives import refuse_cut_off

        if uses_plugin(model.config):
            refuse_cut_off(Path(checkpoint_path), "checkpoint_dir")
        original(fabric, model, checkpoint_path, *args, **more)


def download_only_models(utils: Any) -> None:
    """Refuse, in one line, names of neither a checkpoint nor a model to download.

    LitGPT says that it knows no such model, continues, and fails to open the files that it has not downloaded.
    """

    @wrapping(utils, "auto_download_checkpoint")
    def auto_download_checkpoint(original: Any, model_name: Path | str, *args: Any, **kwargs: Any) -> Path:
        _refuse_neighbours(utils.extend_checkpoint_dir(Path(model_name)), WEIGHTS_FILE)
        if not Path(model_name).parts:  # the working directory, in whose parts LitGPT would look
            model_name = Path(model_name).absolute()
        checkpoint_dir = original(model_name, *args, **kwargs)
        if not (checkpoint_dir / WEIGHTS_FILE).is_file():
            raise NoCheckpointError(
                f"checkpoint_dir: {quoted(model_name)} is neither a folder with {WEIGHTS_FILE} nor a model that "
                f"`litgpt download list` names{how_to_import(Path(model_name))}"
            )
        return checkpoint_dir


def _refuse_neighbours(checkpoint_dir: Path, weights: str) -> None:
    path = Path(checkpoint_dir)
    if path.is_file():
        raise NoCheckpointError(f"checkpoint_dir: {quoted(path)} is a file; name its folder, {quoted(path.parent)}")
    if not (path / weights).is_file() and (hint := in_shards(path / weights) or did_you_mean_inside(path, weights)):
        raise NoCheckpointError(f"checkpoint_dir: {quoted(path)} has no {weights}{hint}")


def refuse_undecoded_text(module: Any) -> None:
    """Refuse, in one line, a text with bytes that are no letters; the tokenizers library speaks of its own types."""

    @wrapping(module.Tokenizer, "encode")
    def encode(original: Any, self: Any, string: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, string, *args, **kwargs)
        except (TypeError, UnicodeEncodeError) as error:
            if isinstance(string, str) and (remedy := undecoded(string)):
                raise SettingsError(f"prompt: {string[:40]!r} cannot be read: {remedy}") from error
            raise


def refuse_conversion(module: Any) -> None:
    """Say which command converts checkpoints with the plugin's layers; LitGPT's does not know them."""

    @wrapping(module, "convert_lit_checkpoint")
    def convert_lit_checkpoint(original: Any, checkpoint_dir: Path, output_dir: Path) -> None:
        config = config_in(checkpoint_dir)
        if config is not None and uses_plugin(config):
            raise SettingsError(
                f"checkpoint_dir: {quoted(checkpoint_dir)} holds a model with layers of litgpt_moe_ext "
                f"(mlp_class_name: {config.mlp_class_name}, attention_class_name: {config.attention_class_name}), "
                "which this conversion does not know. `litgpt-moe export` writes it for transformers; "
                "`litgpt evaluate` and `litgpt generate` need no conversion."
            )
        _require_checkpoint(checkpoint_dir)
        original(checkpoint_dir, output_dir)


def config_in(checkpoint_dir: Path) -> Any:
    """Return the model's configuration in a directory that a command of LitGPT was given; None if there is none."""
    from litgpt.config import Config
    from litgpt.utils import extend_checkpoint_dir

    # LitGPT lets users leave out the leading `checkpoints/`.
    config_file = extend_checkpoint_dir(Path(checkpoint_dir)) / CONFIG_FILE
    return Config.from_file(config_file) if config_file.is_file() else None


def name_the_import(module: Any) -> None:
    """Name `litgpt-moe import` for a model of Hugging Face's, such as an export, that LitGPT has no name for."""

    @wrapping(module, "convert_hf_checkpoint")
    def convert_hf_checkpoint(original: Any, checkpoint_dir: Path, *args: Any, **kwargs: Any) -> None:
        try:
            original(checkpoint_dir, *args, **kwargs)
        except ValueError as error:
            if "is not a supported config name" not in str(error) or not (hint := how_to_import(Path(checkpoint_dir))):
                raise
            raise SettingsError(f"checkpoint_dir: {one_line(error)}{hint}") from error


def require_pretrained(module: Any) -> None:
    """Refuse, in one line, to convert a pretraining checkpoint that does not exist, or weights alone."""

    @wrapping(module, "convert_pretrained_checkpoint")
    def convert_pretrained_checkpoint(original: Any, checkpoint_dir: Path, output_dir: Path) -> None:
        from litgpt_moe_ext.files.archives import open_archive

        file = _require_checkpoint(checkpoint_dir) / WEIGHTS_FILE
        if "model" not in open_archive(file, "checkpoint_dir"):
            raise SettingsError(
                f"checkpoint_dir: {quoted(checkpoint_dir)} has the weights alone already; use it as it is"
            )
        original(checkpoint_dir, output_dir)


def _require_checkpoint(checkpoint_dir: Path) -> Path:
    from litgpt.utils import check_valid_checkpoint_dir, extend_checkpoint_dir

    found = extend_checkpoint_dir(Path(checkpoint_dir))
    check_valid_checkpoint_dir(found, verbose=False, raise_error=True, ignore_tokenizer_files=True)
    return found


def refuse_in_one_line(module: Any) -> None:
    """Let `litgpt` end with one line if this package refuses a setting or a checkpoint; change nothing else."""

    @wrapping(module, "main")
    def main(original: Any) -> None:
        try:
            original()
        except SettingsError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(WRONG_SETTING)


def evaluate_directly(module: Any) -> None:
    """Evaluate checkpoints with the plugin's layers without converting them to Hugging Face's format."""
    from litgpt_moe_ext.evaluation.litgpt_evaluate import wrap_convert_and_evaluate

    module.convert_and_evaluate = wrap_convert_and_evaluate(module.convert_and_evaluate)
