"""What the `config.json` of published models says, without what no model depends on."""

from typing import Any

_YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096, "type": "yarn"}
_DEEPSEEK = {
    "attention_bias": False, "hidden_act": "silu", "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "moe_layer_freq": 1, "n_group": 8, "num_experts_per_tok": 8, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "v_head_dim": 128,
}  # fmt: skip

# By name: the class, and the file.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt-oss-20b": (
        "GptOssForCausalLM",
        {
            "model_type": "gpt_oss", "attention_bias": True, "experts_per_token": 4, "head_dim": 64,
            "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096, "intermediate_size": 2880,
            "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
            "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8,
            "num_local_experts": 32, "quantization_config": {"quant_method": "mxfp4"}, "rms_norm_eps": 1e-05,
            "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn",
                             "original_max_position_embeddings": 4096, "truncate": False},
            "rope_theta": 150000, "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False,
            "vocab_size": 201088,
        },
    ),
    "DeepSeek-V3": (
        "DeepseekV3ForCausalLM",
        {
            **_DEEPSEEK, "model_type": "deepseek_v3", "first_k_dense_replace": 3, "hidden_size": 7168,
            "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1,
            "norm_topk_prob": True, "num_attention_heads": 128, "num_hidden_layers": 61, "num_key_value_heads": 128,
            "num_nextn_predict_layers": 1, "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
            "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_group": 4, "topk_method": "noaux_tc",
            "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                                    "weight_block_size": [128, 128]},
            "vocab_size": 129280,
        },
    ),
    "Qwen3-30B-A3B-FP8": (
        "Qwen3MoeForCausalLM",
        {
            "model_type": "qwen3_moe", "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128,
            "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960,
            "max_window_layers": 48, "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True,
            "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
            "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0,
            "sliding_window": None, "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
            "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                                    "weight_block_size": [128, 128]},
        },
    ),
    "GLM-4.5-Air": (
        "Glm4MoeForCausalLM",
        {
            "model_type": "glm4_moe", "attention_bias": True, "first_k_dense_replace": 1, "head_dim": 128,
            "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 10944, "max_position_embeddings": 131072,
            "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 128, "n_shared_experts": 1,
            "norm_topk_prob": True, "num_attention_heads": 96, "num_experts_per_tok": 8, "num_hidden_layers": 46,
            "num_key_value_heads": 8, "num_nextn_predict_layers": 1, "partial_rotary_factor": 0.5,
            "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000, "routed_scaling_factor": 1.0,
            "tie_word_embeddings": False, "topk_group": 1, "use_qk_norm": False, "vocab_size": 151552,
        },
    ),
    "ERNIE-4.5-21B-A3B": (
        "Ernie4_5_MoeForCausalLM",
        {
            "model_type": "ernie4_5_moe", "hidden_act": "silu", "hidden_size": 2560, "intermediate_size": 12288,
            "max_position_embeddings": 131072, "moe_intermediate_size": 1536, "moe_k": 6, "moe_layer_end_index": 27,
            "moe_layer_interval": 1, "moe_layer_start_index": 1, "moe_num_experts": 64, "moe_num_shared_experts": 2,
            "num_attention_heads": 20, "num_hidden_layers": 28, "num_key_value_heads": 4,
            "num_nextn_predict_layers": 1, "rms_norm_eps": 1e-05, "rope_theta": 500000, "tie_word_embeddings": True,
            "use_bias": False, "vocab_size": 103424,
        },
    ),
    # As the first models of Llama, it says nothing of how wide heads are, nor of heads for keys and values.
    "llama-68m": (
        "LlamaForCausalLM",
        {
            "model_type": "llama", "hidden_act": "silu", "hidden_size": 768, "intermediate_size": 3072,
            "max_position_embeddings": 2048, "num_attention_heads": 12, "num_hidden_layers": 2, "rms_norm_eps": 1e-06,
            "tie_word_embeddings": False, "vocab_size": 32000,
        },
    ),
    "Mixtral-8x7B": (
        "MixtralForCausalLM",
        {
            "model_type": "mixtral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
            "max_position_embeddings": 32768, "num_attention_heads": 32, "num_experts_per_tok": 2,
            "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 32000,
        },
    ),
    "OLMoE-1B-7B": (
        "OlmoeForCausalLM",
        {
            "model_type": "olmoe", "attention_bias": False, "clip_qkv": None, "hidden_act": "silu",
            "hidden_size": 2048, "intermediate_size": 1024, "max_position_embeddings": 4096, "norm_topk_prob": False,
            "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16,
            "num_key_value_heads": 16, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
            "tie_word_embeddings": False, "vocab_size": 50304,
        },
    ),
    "Qwen1.5-MoE-A2.7B": (
        "Qwen2MoeForCausalLM",
        {
            "model_type": "qwen2_moe", "decoder_sparse_step": 1, "hidden_act": "silu", "hidden_size": 2048,
            "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21,
            "moe_intermediate_size": 1408, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 60,
            "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16, "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0, "shared_expert_intermediate_size": 5632, "sliding_window": 32768,
            "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
        },
    ),
}  # fmt: skip
