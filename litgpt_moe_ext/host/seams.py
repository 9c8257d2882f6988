"""The one place that reaches into LitGPT, litdata, lightning and torch: every change, why it is made, and until when.

`SEAMS` is that list as data. `litgpt_moe_ext.host.registration` applies the changes that are made when a module is
imported; the others last for a run, or are made while a module is being imported, and are listed here for the reader.
A model that names none of the plugin's classes takes LitGPT's own path in every one of them.

`python -m litgpt_moe_ext.host.seams` prints the table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

from litgpt_moe_ext.host import (
    checkpoints,
    commands,
    compile,
    flops,
    model,
    padding,
    serving,
    sharding,
    streaming,
    token_rate,
    validation,
)

TESTED_LITGPT = "0.5.13"

_NEVER = "LitGPT offers a place for it"
_RATE = "LitGPT divides by the time of this run"
_LAZY = "Python 3.15 (lazy imports, PEP 810)"
_LOOP = "LitGPT's loop has hooks"


@dataclass(frozen=True)
class Seam:
    """One change to a name of LitGPT, litdata, lightning or torch.

    Attributes:
        module: The module that has the name.
        name: The name, with dots inside a class.
        kind: What happens to the name:
            add: it does not exist, or only by inheritance, and is added.
            wrap: it is replaced by a function that calls it.
            subclass: it is left alone, and a class of the plugin builds on it.
            call: it is left alone, and called with an object of the plugin.
            run: it is replaced during a run; names of LitGPT by `litgpt_moe_ext.training.loop`.
            source: the module is executed from its own source, in part or with an expression changed.
        reason: Why the plugin needs it.
        until: When it becomes superfluous.
        apply: Makes the change in the imported module; None if something else does.
    """

    module: str
    name: str
    kind: Literal["add", "wrap", "subclass", "call", "run", "source"]
    reason: str
    until: str
    apply: Callable[[ModuleType], None] | None = None

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


SEAMS = (
    Seam(
        "litgpt.config", "Config.mlp_class_name", "wrap",
        "Gains the plugin's fields and rules, in place, as do its subclasses.",
        _NEVER, checkpoints.add_fields,
    ),
    Seam(
        "litgpt.config", "Config.from_file", "wrap", "Understands the mark that says a checkpoint needs the plugin.",
        _NEVER, checkpoints.understand_mark,
    ),
    Seam(
        "litgpt.utils", "asdict", "wrap", "Leaves unused fields and backends out of what it saves, sets that mark.",
        _NEVER, checkpoints.write_mark,
    ),
    Seam(
        "litgpt.utils", "check_valid_checkpoint_dir", "wrap", "Names the checkpoint that a run's folder stands for.",
        "LitGPT does", commands.name_checkpoints,
    ),
    Seam(
        "litgpt.utils", "load_checkpoint", "wrap", "Ends with one line where a file of weights is cut off.",
        "LitGPT does", commands.refuse_cut_off_weights,
    ),
    *(
        Seam(
            "litgpt.utils", name, "wrap", "Finds the weights in a training checkpoint for models under FSDP.",
            "LitGPT does", apply,
        )
        for name, apply in (
            ("load_checkpoint", sharding.load_training_checkpoints),
            ("load_checkpoint_update", sharding.load_training_checkpoints_with_adapters),
        )
    ),
    Seam(
        "litgpt.utils", "auto_download_checkpoint", "wrap", "Ends with one line where there is nothing to download.",
        "LitGPT does", commands.download_only_models,
    ),
    Seam(
        "litgpt.utils", "estimate_model_memory", "wrap", "Counts all experts, for `litgpt validate`.",
        "LitGPT's formula does", validation.count_all_parameters,
    ),
    Seam(
        "litgpt.scripts.validate", "Config", "wrap", "Understands the mark that says a checkpoint needs the plugin.",
        "LitGPT reads it by Config.from_file", validation.accept_mark,
    ),
    Seam(
        "litgpt.model", "__getattr__", "add", "Offers the MLP classes, which LitGPT looks up there by name.",
        "LitGPT has a registry of layers", model.offer_mlp_classes,
    ),
    Seam("litgpt.model", "LLaMAMLP", "subclass", "The dense layers and shared experts of an MoE model.", _NEVER),
    Seam("litgpt.model", "LLaMAMoE", "subclass", "What checkpoints are exported to and measured against.", _NEVER),
    Seam(
        "litgpt.model", "Block.__init__", "wrap", "Puts dense layers between MoE layers, adds residual dropout.",
        _NEVER, model.extend_blocks,
    ),
    Seam(
        "litgpt.model", "Block.forward", "wrap", "Passes padding and token ids on to the MoE layer of a block.",
        "LitGPT's blocks pass arguments on", model.pass_batch_metadata,
    ),
    Seam(
        "litgpt.model", "CausalSelfAttention.__new__", "add", "Builds the attention class a configuration names.",
        "LitGPT has a registry of layers", model.choose_attention,
    ),
    Seam(
        "litgpt.model", "GPT.rope_cache", "wrap", "Rotary tables of the plugin's attention and of latent attention.",
        "LitGPT's YaRN agrees with the paper", model.choose_rope_cache,
    ),
    Seam(
        "litgpt.model", "RMSNorm.forward", "wrap", "One kernel each way on GPUs, in the plugin's models.",
        "LitGPT calls torch's rms_norm", model.fuse_norms,
    ),
    Seam(
        "litgpt.model", "GPT.__init__", "wrap",
        "Adds learned positions; norms may be fused.",
        _NEVER, model.extend_model_init,
    ),
    Seam(
        "litgpt.model", "GPT.forward", "wrap", "Learned positions, documents, padding, ids, dropout; no unread mask.",
        _NEVER, model.extend_model_forward,
    ),
    Seam(
        "litgpt.model", "GPT.max_seq_length", "wrap",
        "Any length for models with a streaming cache, one line at others.",
        _NEVER, model.allow_any_length,
    ),
    Seam(
        "litgpt.model", "GPT.set_kv_cache", "wrap", "A streaming cache as long as what it keeps, no unread mask.",
        _NEVER, model.size_kv_cache,
    ),
    Seam(
        "litgpt.model", "LLaMAMoE.forward", "wrap", "Meta tensors count the active experts' FLOPs instead of crashing.",
        "LLaMAMoE does not use torch.where", flops.count_llama_moe,
    ),
    Seam(
        "torch.optim.optimizer", "register_optimizer_step_post_hook", "call",
        "Moves the balancing bias once per optimizer step, whoever owns the loop.", "permanent: a public hook",
        model.move_router_biases,
    ),
    Seam(
        "torch.utils.flop_counter", "register_flop_formula", "call",
        "FLOPs of grouped products and of flash-attn, which count as 0.", "torch has the formulas",
        flops.count_products,
    ),
    Seam(
        "litgpt.pretrain", "fit", "wrap", "Measures this run's tokens per second.", _RATE, token_rate.measure_rate
    ),
    Seam(
        "litgpt.pretrain", "main", "wrap", "Prints that rate; LitGPT divides by a reading of the clock.", _RATE,
        token_rate.print_rate,
    ),
    Seam(
        "litgpt.pretrain", "main", "wrap", "Compiles only where a compiler works and pays.",
        "LitGPT has an option for it", compile.compile_where_it_works,
    ),
    *(
        Seam(
            module, "chunked_cross_entropy", "wrap", "Tells auxiliary losses by what the loop scales its loss.",
            _LOOP, model.mark_loss,
        )
        for module in ("litgpt.pretrain", "litgpt.finetune.full", "litgpt.finetune.adapter")
    ),
    Seam(
        "litgpt.pretrain", "main", "wrap", "Makes a step a mean over its tokens, where this package's data pads.",
        _LOOP, padding.weigh_pretraining,
    ),
    Seam(
        "litgpt.finetune.full", "main", "wrap", "Makes a step and a validation means over their tokens.",
        "LitGPT's loop weighs micro-batches", padding.weigh_finetuning,
    ),
    *(
        Seam(
            module, "main", "wrap", "Keeps balancing biases in float32 under FSDP.",
            "Fabric leaves buffers alone", sharding.keep_biases_exact,
        )
        for module in ("litgpt.pretrain", "litgpt.finetune.full", "litgpt.finetune.adapter")
    ),
    *(
        Seam(
            module, "fit", "wrap", "Says which inputs of a batch are padding, for MoE layers.",
            "LitGPT passes a padding mask", padding.mark_finetuning_padding,
        )
        for module in ("litgpt.finetune.full", "litgpt.finetune.adapter")
    ),
    *(
        Seam(
            module, "__getattr__", "add", "Says that this way of finetuning cannot reach MoE layers.",
            "it can", commands.refuse_mlp_classes,
        )
        for module in ("litgpt.lora", "litgpt.adapter_v2")
    ),
    Seam(
        "litgpt.generate.tp", "tensor_parallel", "wrap", "Says which layers it cannot divide among GPUs.",
        "LitGPT divides them", commands.refuse_division,
    ),
    *(
        Seam(
            module, "main", "wrap", "Ends with one line at a training checkpoint.",
            "LitGPT finds the weights in one", commands.require_weights_alone(instead=instead),
        )
        for module, instead in {
            "litgpt.generate.tp": "litgpt generate",
            "litgpt.generate.sequentially": "litgpt generate",
            "litgpt.generate.adapter": None,
            "litgpt.generate.adapter_v2": None,
        }.items()
    ),
    Seam(
        "litgpt.scripts.merge_lora", "merge_lora", "wrap", "Ends with one line at a training checkpoint.",
        "LitGPT finds the weights in one", commands.require_weights_alone("merge_lora", "pretrained_checkpoint_dir"),
    ),
    *(
        Seam(
            module, "main", "wrap", "Refuses prompts without the mark after which it prints.",
            "LitGPT prints without it", commands.require_response_mark,
        )
        for module in ("litgpt.generate.full", "litgpt.generate.adapter")
    ),
    Seam(
        "litgpt.tokenizer", "Tokenizer.encode", "wrap", "Ends with one line at a text that is not Unicode.",
        "LitGPT does", commands.refuse_undecoded_text,
    ),
    Seam(
        "litgpt.deploy.serve", "BaseLitAPI.setup", "wrap", "Answers what it refuses with a reason.",
        "LitGPT does", serving.answer_refusals,
    ),
    Seam(
        "litgpt.deploy.serve", "run_server", "wrap", "Ends all its processes at SIGTERM.",
        "LitServe does", serving.end_with_its_processes,
    ),
    Seam(
        "litdata.streaming.item_loader", "TokensLoader.load_item_from_chunk", "wrap",
        "Copies sequences that would be views of a file no longer mapped.", "litdata unmaps no file in use",
        streaming.copy_sequences,
    ),
    Seam(
        "litgpt.generate.base", "generate_fn", "wrap", "Ends with one line where there is nothing to generate.",
        "LitGPT does", commands.refuse_to_generate_nothing,
    ),
    Seam(
        "litgpt.chat.base", "interact", "wrap", "Ends at the end of its input.", "LitGPT's chat does",
        commands.end_chat_with_its_input,
    ),
    Seam(
        "litgpt.pretrain", "main", "wrap", "Ends with one line at a training checkpoint to start from.",
        "LitGPT finds the weights in one", commands.require_weights_to_start,
    ),
    Seam(
        "litgpt.finetune.lora", "main", "wrap", "Ends with one line at a training checkpoint, before it trains.",
        "LitGPT merges with the weights in one", commands.require_weights_alone(instead="litgpt finetune_full"),
    ),
    *(
        Seam(
            module, "main", "wrap", "Names layers that it cannot finetune before it prepares data.",
            "LitGPT builds the model first", commands.refuse_before_data,
        )
        for module in ("litgpt.finetune.lora", "litgpt.finetune.adapter", "litgpt.finetune.adapter_v2")
    ),
    Seam(
        "litgpt.generate.tp", "main", "wrap", "Says which layers it cannot divide, before it loads them.",
        "LitGPT divides them", commands.refuse_division_first,
    ),
    Seam(
        "litgpt.scripts.convert_lit_checkpoint", "convert_lit_checkpoint", "wrap",
        "Names `litgpt-moe export`, which knows the plugin's layers.", "LitGPT's conversion knows them",
        commands.refuse_conversion,
    ),
    Seam(
        "litgpt.scripts.convert_hf_checkpoint", "convert_hf_checkpoint", "wrap",
        "Names `litgpt-moe import` for models without a name.", "LitGPT reads config.json", commands.name_the_import,
    ),
    Seam(
        "litgpt.scripts.convert_pretrained_checkpoint", "convert_pretrained_checkpoint", "wrap",
        "Ends with one line where there is no checkpoint, or nothing to convert.", "LitGPT does",
        commands.require_pretrained,
    ),
    Seam(
        "litgpt.eval.evaluate", "convert_and_evaluate", "wrap",
        "Evaluates checkpoints with the plugin's layers directly, without conversion.", "LitGPT does",
        commands.evaluate_directly,
    ),
    Seam(
        "litgpt.__main__", "main", "wrap", "Ends with one line where this package refuses something.",
        "LitGPT's command prints errors of settings as one line", commands.refuse_in_one_line,
    ),
    Seam("litgpt.pretrain", "fit", "run", "Keeps the training state; listens for signals.", _LOOP),
    Seam("litgpt.pretrain", "CycleIterator", "run", "Acts between two iterations: signals, limits, events.", _LOOP),
    Seam("litgpt.pretrain", "save_checkpoint", "run", "Writes under a temporary name, then renames.", _LOOP),
    Seam("litgpt.pretrain", "save_hyperparameters", "run", "Writes the run's values, not the command line's.", _LOOP),
    Seam("litgpt.pretrain", "find_resume_path", "run", "Chooses the newest whole checkpoint.", _LOOP),
    Seam("litgpt.pretrain", "chunked_cross_entropy", "run", "A mean over a step's tokens; the head's work.", _LOOP),
    Seam("litgpt.pretrain", "validate", "run", "A validation's mean over tokens; heeds signals.", _LOOP),
    Seam("litgpt.pretrain", "RunningMean", "run", "Averages losses without waiting for the device.", _LOOP),
    Seam("litgpt.pretrain", "math", "run", "Has a perplexity for a loss above 709.", _LOOP),
    Seam("litgpt.pretrain", "get_dataloaders", "run", "Resumes with another number of processes.", _LOOP),
    Seam("litgpt.pretrain", "get_lr", "run", "Follows the run's schedule.", _LOOP),
    Seam("litgpt.pretrain", "measure_flops", "run", "Counts for the training's sequence length.", _LOOP),
    Seam("litgpt.pretrain", "instantiate_torch_optimizer", "run", "Sorts parameters into groups.", _LOOP),
    Seam(
        "torchmetrics", "__init__", "source", "Waits with its big dependencies until they are asked for.", _LAZY
    ),
    Seam("torchmetrics.utilities.plot", "style_change", "source", "Does not load matplotlib.", _LAZY),
    Seam("litgpt", "__init__", "source", "Waits with what describing a model does not need.", _LAZY),
    Seam("litgpt.model", "qkv_reassemble", "source", "Imports the converter of old checkpoints on demand.", _LAZY),
    Seam("litgpt.tokenizer", "fix_and_load_json", "source", "Imports the mender of damaged files on demand.", _LAZY),
    Seam(
        "litgpt.data.base", "LightningDataModule", "source",
        "Waits with lightning for a data module that needs it, where a command only describes a run.",
        "LitGPT's data modules are none of lightning's",
    ),
    Seam(
        "torch._meta_registrations", "activate_meta", "source",
        "Waits with torch's shape functions in Python, where a command only describes a model.",
        "torch loads them on demand",
    ),
    Seam(
        "torch", "_disable_dynamo", "call", "Marks torch's shape functions, so that calling them loads no compiler.",
        "torch does not load it for them",
    ),
    Seam("lightning.fabric.wrappers", "OptimizedModule", "source", "Does not load torch's compiler.", _LAZY),
    Seam("lightning.pytorch.utilities.compile", "OptimizedModule", "source", "Does not load torch's compiler.", _LAZY),
    Seam(
        "lightning.pytorch.trainer.connectors.logger_connector.result", "_ResultCollection", "source",
        "Does not load torch's compiler.", "lightning decorates with a lazy twin",
    ),
    Seam("torch.utils.flop_counter", "_JITFunction", "source", "Does not load Triton.", _LAZY),
    Seam(
        "torch", "compile", "run", "Returns what it is given where compiling does not work or pay.",
        "torch.compile(disable=True) loads none",
    ),
    Seam(
        "lightning.fabric.wrappers", "_FabricModule.forward", "run",
        "Leaves a batch to the loss function, where CUDA graphs hold its passes.", _LOOP,
    ),
    Seam(
        "lightning.fabric.plugins.precision", "Precision.convert_output", "run",
        "Leaves the logits of a batch that trains in 16 bits, for the loss.", "Fabric leaves that to the caller",
    ),
    Seam(
        "torch.optim", "Optimizer.step", "run",
        "Steps without asking the compiler to break its graph, which loads it; on a GPU takes the largest weights "
        "first, and learning rates from the device, so that a CUDA graph can repeat it.",
        "torch does not load it for them, and passes rates as numbers",
    ),
    Seam("litgpt.generate.base", "torch._dynamo", "source", "Does not load torch's compiler.", _LAZY),
    Seam("litgpt.generate.speculative_decoding", "torch._dynamo", "source", "Does not load torch's compiler.", _LAZY),
    Seam("litgpt.generate.tp", "torch._dynamo", "source", "Does not load torch's compiler.", _LAZY),
)  # fmt: skip


def table() -> str:
    """Return the seams as a Markdown table."""
    lines = ["| name | kind | what for | until |", "| --- | --- | --- | --- |"]
    lines += [f"| `{seam}` | {seam.kind} | {seam.reason} | {seam.until} |" for seam in SEAMS]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
