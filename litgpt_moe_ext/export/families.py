"""The values of `Facts` that families of models allow, for the classes of any library.

The tables of `hf/architectures.py` and `gguf/architectures.py` state how each class differs.
"""

from typing import Any

# Common to Llama's relatives.
LLAMA_LIKE: dict[str, tuple[Any, ...]] = {
    "attention": ("grouped",),
    "norm": ("rms",),
    "positions": ("rotary",),
    "rope": ("default", "linear", "llama3", "yarn"),
    "rope_layout": ("half",),
    "sinks": ("none",),
    "window": ("none",),
    "clipped": (False,),
    "qk_norm": ("none",),
    "attention_bias": ("none",),
    "activation": ("swiglu",),
    "mlp_bias": (False,),
    "head_bias": (False,),
    "scale": ("head",),
}
SOFTMAX = LLAMA_LIKE | {
    "router": ("topk",),
    "score": ("softmax",),
    "gate_on_input": (False,),
    "router_bias": (False,),
    "norm_topk": (True,),
    "balancing_bias": (False,),
    "groups": ("none",),
    "scaled": (False,),
    "shared": ("none",),
}
# Sigmoid routers balanced by a bias.
BALANCED: dict[str, tuple[Any, ...]] = {
    "score": ("sigmoid",),
    "norm_topk": (True, False),
    "balancing_bias": (True, False),
    "groups": ("none", "best_two"),
}
# DeepSeek's attention and layers.
LATENT: dict[str, tuple[Any, ...]] = {
    "attention": ("latent",),
    "grouped": (False,),
    "layers": ("moe", "mixed"),
    "rope_layout": ("interleaved", "half"),
    "scaled": (True, False),
    "shared": ("plain",),
}
# LayerNorm, learned positions, dense layers.
GPT2: dict[str, tuple[Any, ...]] = {
    "attention": ("grouped",),
    "layers": ("dense",),
    "norm": ("layer",),
    "positions": ("learned",),
    "sinks": ("none",),
    "window": ("none",),
    "clipped": (False,),
    "qk_norm": ("none",),
    "attention_bias": ("none", "all"),
    "grouped": (False,),
    "free_head_size": (False,),
    "activation": ("gelu", "gelu_tanh", "relu"),
    "head_bias": (False,),
    "scale": ("head",),
}
# Biases that its classes have in every layer, zeros or not, by our names.
GPT2_BIASES = ("attn.qkv.bias", "attn.proj.bias", "mlp.fc.bias", "mlp.proj.bias")
# Balanced routers, and shared experts.
GLM = BALANCED | {
    "layers": ("moe", "mixed"),
    "positions": ("rotary", "partial_rotary"),
    "qk_norm": ("none", "head"),
    "attention_bias": ("none", "qkv"),
    "scaled": (True, False),
    "shared": ("plain",),
}
# Sinks, windows, and biases everywhere.
GPT_OSS: dict[str, tuple[Any, ...]] = {
    "layers": ("moe",),
    "sinks": ("all",),
    "window": ("none", "all", "some"),
    "attention_bias": ("all",),
    "activation": ("clamped_swiglu",),
    "mlp_bias": (True,),
    "router_bias": (True, False),
}
