"""The one place that reaches into LitGPT: what is added to it, and why.

| seam of LitGPT                      | what happens to it                                                             |
| ----------------------------------- | ------------------------------------------------------------------------------ |
| `litgpt.config.Config`              | gains the fields of `litgpt_moe_ext.host.config`, in place                     |
| `Config.from_file`                  | understands the mark that says a checkpoint needs the plugin                   |
| `litgpt.utils.asdict`               | leaves unused fields out of saved configurations, sets that mark where needed  |
| `litgpt.model.__getattr__`          | offers the MLP classes, because LitGPT looks them up there by name             |
| `Block.__init__`                    | puts dense layers between MoE layers, adds residual dropout                    |
| `CausalSelfAttention.__new__`       | builds the attention class that a configuration names                          |
| `GPT.rope_cache`                    | asks the plugin for the rotary tables of such configurations                   |
| `GPT.__init__`, `GPT.forward`       | learned positions, documents, embedding dropout; routers that see token ids    |
| `GPT.max_seq_length`, `set_kv_cache` | any length for models with a streaming cache                                  |
| `litgpt.lora`, `adapter_v2`         | say that they cannot finetune MoE layers                                       |
| `convert_lit_checkpoint`            | says that no Hugging Face architecture fits the plugin's layers                |
| `litgpt.eval.evaluate`              | evaluates checkpoints with the plugin's layers directly, without conversion    |
| `litgpt.pretrain`, `finetune.full`  | their loss tells auxiliary losses by what the loop scales it                   |
| torch's global optimizer-step hook  | moves the balancing bias once per optimizer step, whoever owns the loop        |

A model that names none of the plugin's classes takes LitGPT's own path in every one of them. The repairs of defects in
host libraries are in `litgpt_moe_ext.host.repairs`.
"""

import copy
import importlib
import importlib.metadata
import warnings
from functools import wraps
from pathlib import Path
from typing import Any

from litgpt_moe_ext import __version__
from litgpt_moe_ext.config.features import MLP_CLASS_NAMES
from litgpt_moe_ext.host import autoload
from litgpt_moe_ext.host.config import extend_config, uses_plugin, without_unused_fields

TESTED_LITGPT = "0.5.13"

# Written first into the `model_config.yaml` of a model that needs the plugin. Plain LitGPT then fails with an error
# that names this package ("unexpected keyword argument '_requires_litgpt_moe_ext'") instead of one about some inner
# field.
REQUIRES_MARK = "_requires_litgpt_moe_ext"

_registered = False


def register() -> None:
    """Extend LitGPT. Safe to call more than once.

    Raises:
        RuntimeError: If the installed LitGPT lacks a seam that the plugin needs; the message names it.
    """
    global _registered
    if _registered:
        return
    # Set first: the imports below may import LitGPT's model definition, whose import hook ends up here again.
    _registered = True
    try:
        _extend_litgpt()
    except BaseException:
        _registered = False
        raise


def _extend_litgpt() -> None:
    # This may run while the package `litgpt` is still being imported and has no attributes yet; `as` does without them.
    import litgpt.config as config
    import litgpt.model as model
    import litgpt.utils as utils

    _check_version()
    _require_seams(config, model, utils)

    from litgpt_moe_ext.extend import load_extensions
    from litgpt_moe_ext.host.repairs import install_patches
    from litgpt_moe_ext.moe.balancing import install_optimizer_hook

    load_extensions()
    extend_config(config.Config)
    _extend_config_files(config.Config, utils)
    _offer_mlp_classes(model)
    _extend_blocks(model.Block)
    _dispatch_attention(model.CausalSelfAttention)
    _dispatch_rope_cache(model.GPT)
    _extend_model(model.GPT)
    install_optimizer_hook()
    install_patches()
    for loop in ("litgpt.pretrain", "litgpt.finetune.full"):
        autoload.when_imported(loop, _mark_loss)
    for module in ("litgpt.lora", "litgpt.adapter_v2"):
        autoload.when_imported(module, _refuse_mlp_classes)
    autoload.when_imported("litgpt.scripts.convert_lit_checkpoint", _refuse_conversion)
    autoload.when_imported("litgpt.eval.evaluate", _extend_evaluate)


def _check_version() -> None:
    version = importlib.metadata.version("litgpt")
    if version.split(".")[:2] != TESTED_LITGPT.split(".")[:2]:
        warnings.warn(
            f"litgpt_moe_ext {__version__} is tested with litgpt {TESTED_LITGPT}, but {version} is installed. "
            f"If something misbehaves, `pip install litgpt=={TESTED_LITGPT}`.",
            RuntimeWarning,
            stacklevel=2,
        )


def _require_seams(config: Any, model: Any, utils: Any) -> None:
    seams = {
        "litgpt.config.Config.__post_init__": hasattr(config.Config, "__post_init__"),
        "litgpt.config.Config.from_file": hasattr(config.Config, "from_file"),
        "litgpt.config.Config.mlp_class_name": "mlp_class_name" in config.Config.__dataclass_fields__,
        "litgpt.utils.asdict": hasattr(utils, "asdict"),
        "litgpt.model.Block": hasattr(model, "Block"),
        "litgpt.model.CausalSelfAttention": hasattr(model, "CausalSelfAttention"),
        "litgpt.model.LLaMAMLP": hasattr(model, "LLaMAMLP"),
        "litgpt.model.LLaMAMoE": hasattr(model, "LLaMAMoE"),
        "litgpt.model.GPT.rope_cache": hasattr(model.GPT, "rope_cache"),
        "litgpt.model.GPT.set_kv_cache": hasattr(model.GPT, "set_kv_cache"),
        "litgpt.model.GPT.max_seq_length": isinstance(getattr(model.GPT, "max_seq_length", None), property),
    }
    missing = [name for name, found in seams.items() if not found]
    if missing:
        raise RuntimeError(
            f"litgpt {importlib.metadata.version('litgpt')} lacks {', '.join(missing)}, which litgpt_moe_ext "
            f"{__version__} builds on. Install litgpt=={TESTED_LITGPT}."
        )


def _extend_config_files(config_class: type, utils: Any) -> None:
    original_from_file = config_class.from_file.__func__
    original_asdict = utils.asdict

    @classmethod
    @wraps(original_from_file)
    def from_file(cls: type, path: str | Path, **kwargs: Any) -> Any:
        import yaml

        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
        if not isinstance(content, dict) or REQUIRES_MARK not in content:
            return original_from_file(cls, path, **kwargs)
        _check_written_by(content.pop(REQUIRES_MARK), path)
        return cls(**{**content, **kwargs})

    @wraps(original_asdict)
    def asdict(obj: Any, **kwargs: Any) -> Any:
        result = original_asdict(obj, **kwargs)
        if not isinstance(obj, config_class):
            return result
        result = without_unused_fields(result)
        return {REQUIRES_MARK: __version__, **result} if uses_plugin(obj) else result

    config_class.from_file = from_file
    utils.asdict = asdict


def _check_written_by(version: str, path: str | Path) -> None:
    written_by = tuple(int(part) for part in str(version).split(".")[:2])
    if written_by > tuple(int(part) for part in __version__.split(".")[:2]):
        warnings.warn(
            f"{path} was written by litgpt_moe_ext {version}, newer than the installed {__version__}; upgrade if it "
            "fails to load.",
            RuntimeWarning,
            stacklevel=3,
        )


def _offer_mlp_classes(model: Any) -> None:
    # The layers build on LitGPT's model definition, so they can only be imported after it; the module's `__getattr__`
    # (PEP 562) does so when somebody first asks for one of them.
    def __getattr__(name: str) -> type:
        if name not in MLP_CLASS_NAMES:
            raise AttributeError(f"module {model.__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module("litgpt_moe_ext.moe.layer"), name)

    model.__getattr__ = __getattr__


def _extend_blocks(block_class: type) -> None:
    from litgpt_moe_ext.config.features import is_dense_layer

    original = block_class.__init__

    @wraps(original)
    def __init__(self: Any, config: Any, block_idx: int) -> None:
        if is_dense_layer(config, block_idx):
            # LitGPT would build the MoE layer first, and then throw it away.
            config = copy.copy(config)
            config.mlp_class_name, config.first_k_dense_replace = "FeedForward", None
        original(self, config, block_idx)
        if config.residual_dropout:
            import torch

            # Both stand where the output of a layer is about to be added to the residual stream.
            self.post_attention_norm = torch.nn.Dropout(config.residual_dropout)
            self.post_mlp_norm = torch.nn.Dropout(config.residual_dropout)

    block_class.__init__ = __init__


def _refuse_mlp_classes(module: Any) -> None:
    def __getattr__(name: str) -> type:
        if name in MLP_CLASS_NAMES:
            raise ValueError(
                f"mlp_class_name: {name} cannot be finetuned with {module.__name__}, which knows LitGPT's own layers "
                "only. Finetune all weights instead (litgpt finetune_full)."
            )
        raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

    module.__getattr__ = __getattr__


def _refuse_conversion(module: Any) -> None:
    original = module.convert_lit_checkpoint

    @wraps(original)
    def convert_lit_checkpoint(checkpoint_dir: Path, output_dir: Path) -> None:
        from litgpt.config import Config

        config_file = Path(checkpoint_dir) / "model_config.yaml"
        if config_file.is_file() and uses_plugin(config := Config.from_file(config_file)):
            raise ValueError(
                f"checkpoint_dir: {str(checkpoint_dir)!r} holds a model with layers of litgpt_moe_ext "
                f"(mlp_class_name: {config.mlp_class_name}, attention_class_name: {config.attention_class_name}), "
                "which this conversion does not know. `litgpt evaluate` and `litgpt generate` need no conversion."
            )
        original(checkpoint_dir, output_dir)

    module.convert_lit_checkpoint = convert_lit_checkpoint


def _dispatch_attention(attention_class: type) -> None:
    # LitGPT's blocks call `CausalSelfAttention(config, block_idx)`. Choosing the class in `__new__` keeps every name
    # and every isinstance check of LitGPT as it is. Copying and unpickling call `__new__` without a configuration.
    def __new__(cls: type, config: Any = None, *args: Any, **kwargs: Any) -> Any:
        name = getattr(config, "attention_class_name", None)
        if name is None:
            return object.__new__(cls)
        from litgpt_moe_ext.attention.layer import SinkAttention

        if issubclass(cls, SinkAttention):
            return object.__new__(cls)
        if cls is attention_class:
            return object.__new__(SinkAttention)
        raise ValueError(
            f"attention_class_name: {name!r} cannot be combined with {cls.__module__}.{cls.__name__}, which would "
            "leave its sinks out. Finetune all weights instead (litgpt finetune_full)."
        )

    attention_class.__new__ = __new__


def _dispatch_rope_cache(gpt_class: type) -> None:
    original = gpt_class.rope_cache

    @wraps(original)
    def rope_cache(self: Any, device: Any = None) -> Any:
        if self.config.attention_class_name is None:
            return original(self, device=device)
        from litgpt_moe_ext.attention.model import rope_length
        from litgpt_moe_ext.attention.rope import build_rope_cache

        return build_rope_cache(self.config, rope_length(self), device=device)

    gpt_class.rope_cache = rope_cache


def _extend_model(gpt_class: type) -> None:
    # Everything here asks the configuration first, and is LitGPT's own where it names nothing of the plugin.
    from litgpt_moe_ext.config.features import changes_model, routers_need

    original_init, original_forward = gpt_class.__init__, gpt_class.forward
    original_length, original_set_kv_cache = gpt_class.max_seq_length, gpt_class.set_kv_cache

    @wraps(original_init)
    def __init__(self: Any, config: Any) -> None:
        original_init(self, config)
        if changes_model(config):
            from litgpt_moe_ext.attention.model import add_position_embedding

            add_position_embedding(self)
        if routers_need(config, "token_ids"):
            from litgpt_moe_ext.moe.fixed_routers import share_token_ids

            share_token_ids(self)

    @wraps(original_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not changes_model(self.config):
            return original_forward(self, *args, **kwargs)
        from litgpt_moe_ext.attention.model import forward

        return forward(original_forward, self, *args, **kwargs)

    def set_max_seq_length(self: Any, value: int) -> None:
        streams = getattr(self.config, "streaming_cache_window", None) is not None
        original_length.fset(self, min(value, self.config.block_size) if streams else value)
        self._max_seq_length = value

    @wraps(original_set_kv_cache)
    def set_kv_cache(self: Any, batch_size: int, max_seq_length: int | None = None, *args: Any, **kwargs: Any) -> None:
        if getattr(self.config, "streaming_cache_window", None) is not None:
            from litgpt_moe_ext.attention.model import cache_length

            # `LLM.generate`, and `litgpt serve` with it, say here and nowhere else how long the text will be.
            if max_seq_length is not None and max_seq_length > self.max_seq_length:
                self.max_seq_length = max_seq_length
            max_seq_length = cache_length(self, max_seq_length)
        original_set_kv_cache(self, batch_size, max_seq_length, *args, **kwargs)

    gpt_class.__init__, gpt_class.forward, gpt_class.set_kv_cache = __init__, forward, set_kv_cache
    gpt_class.max_seq_length = original_length.setter(set_max_seq_length)


def _mark_loss(loop: Any) -> None:
    from litgpt_moe_ext.moe.balancing import any_router_lives
    from litgpt_moe_ext.moe.gradient_injection import remember_scale

    original = loop.chunked_cross_entropy

    @wraps(original)
    def chunked_cross_entropy(*args: Any, **kwargs: Any) -> Any:
        loss = original(*args, **kwargs)
        return remember_scale(loss) if any_router_lives() else loss

    loop.chunked_cross_entropy = chunked_cross_entropy


def _extend_evaluate(evaluate_module: Any) -> None:
    from litgpt_moe_ext.evaluation.evaluate import wrap_convert_and_evaluate

    evaluate_module.convert_and_evaluate = wrap_convert_and_evaluate(evaluate_module.convert_and_evaluate)
