"""Names of our settings in other trainers and libraries."""

# Other trainers' names, in any section.
_ELSEWHERE = {
    **dict.fromkeys(("lr", "learning_rate"), "optimizer.lr"),
    "weight_decay": "optimizer.weight_decay",
    **dict.fromkeys(("warmup_steps", "warmup_iters"), "train.lr_warmup_steps"),
    **dict.fromkeys(("grad_clip", "max_grad_norm", "gradient_clipping"), "train.max_norm"),
    **dict.fromkeys(("batch_size", "per_device_train_batch_size"), "train.micro_batch_size"),
    "train_batch_size": "train.global_batch_size",
    **dict.fromkeys(
        ("gradient_accumulation_steps", "grad_accum_steps"), "train.global_batch_size, of which that follows"
    ),
    **dict.fromkeys(("max_iters", "num_steps", "max_train_steps"), "train.max_steps"),
    "num_train_epochs": "train.epochs",
    **dict.fromkeys(("seq_length", "seq_len", "context_length", "max_length"), "train.max_seq_length"),
    **dict.fromkeys(("dtype", "bf16", "fp16", "mixed_precision"), "precision"),
    **dict.fromkeys(("deepspeed", "zero_stage"), "strategy, such as deepspeed_stage_2"),
    "fsdp": "strategy, such as fsdp2",
    **dict.fromkeys(("gpus", "n_gpus", "nproc", "nproc_per_node"), "devices"),
    "nnodes": "num_nodes",
    **dict.fromkeys(("gradient_checkpointing", "recompute"), "activation_checkpointing"),
    "output_dir": "out_dir",
    **dict.fromkeys(("eval_interval", "eval_steps"), "eval.interval"),
    **dict.fromkeys(("save_steps", "checkpoint_interval"), "train.save_interval"),
    "save_total_limit": "checkpoint.keep_last",
    **dict.fromkeys(("logging_steps", "log_every"), "train.log_interval"),
    **dict.fromkeys(("report_to", "wandb"), "logger_name"),
    "resume_from_checkpoint": "resume",
    "init_from": "initial_checkpoint_dir",
    **dict.fromkeys(("lr_scheduler", "lr_scheduler_type"), "schedule.name"),
    **dict.fromkeys(("tokenizer", "tokenizer_name"), "tokenizer_dir"),
    "ema_decay": "ema.decay",
}
# Names of model configuration fields in Hugging Face's and other libraries.
_MODELS_ELSEWHERE = {
    **dict.fromkeys(("hidden_size", "d_model", "dim"), "n_embd"),
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_query_groups",
    "head_dim": "head_size",
    **dict.fromkeys(("max_position_embeddings", "context_length", "max_seq_len"), "block_size"),
    **dict.fromkeys(("d_ff", "ffn_hidden_size"), "intermediate_size"),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), "n_expert"),
    **dict.fromkeys(("num_experts_per_tok", "top_k", "moe_top_k"), "n_expert_per_token"),
    "num_shared_experts": "n_shared_expert",
    "n_group": "n_expert_groups",
    "topk_group": "n_topk_groups",
    "scoring_func": "router_score_function",
    "router_aux_loss_coef": "router_load_balancing_loss_coef",
    "rope_theta": "rope_base",
    "rope_scaling": "rope_adjustments",
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps"), "norm_eps"),
    "hidden_act": "mlp_activation",
}


def meant_by(prefix: str, name: str) -> str | None:
    """Return the setting that another library's name refers to, or None if unknown.

    Args:
        prefix: The section in which it was given, with its dot.
        name: The given name.
    """
    if name == "tie_word_embeddings":
        return "train.tie_embeddings"
    if prefix == "model_config.":
        field = _MODELS_ELSEWHERE.get(name)
        return None if field is None else f"{prefix}{field}"
    return _ELSEWHERE.get(name) if prefix in ("", "train.", "optimizer.") else None
