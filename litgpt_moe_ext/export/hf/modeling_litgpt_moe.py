"""Language models trained with litgpt_moe_ext, for transformers 4.56 and later: plain torch, one file.

A checkpoint's `config.json` names the classes here under `auto_map`, so `AutoModelForCausalLM.from_pretrained(DIR,
trust_remote_code=True)` finds them, and so does `vllm serve DIR --trust-remote-code`, whose Transformers backend
replaces attention, experts and linear layers by its own. Decoder blocks have attention (grouped queries, rotary or
learned positions, sliding windows, learned sinks) and feed-forward or Mixture-of-Experts layers.

Shape legend: B batch, T queries, S keys, D model width, H query heads, G key/value heads, d head size, E experts,
K chosen experts per token, F hidden width of an expert, N = B * T tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# The name of the key/value cache, which transformers 5 changed.
_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def _clamped_silu(x):
    x = x.clamp(max=7.0)
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS = {
    "clamped_silu": _clamped_silu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def _gate(config, gate, up):
    """Return the hidden activations of a gated layer; GPT-OSS clamps both projections, and adds 1 to one."""
    if config.hidden_act == "clamped_silu":
        up = up.clamp(-7.0, 7.0) + 1.0
    return _ACTIVATIONS[config.hidden_act](gate) * up


# Settings of a model, with defaults for a tiny one.
_SETTINGS = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "norm": "rms",
    "norm_eps": 1e-5,
    "attention_bias": False,
    "attention_out_bias": False,
    "attention_scale": None,
    "attention_windows": None,
    "attention_sinks": None,
    "qk_norm": "none",
    "clip_qkv": None,
    "learned_positions": False,
    "rope_inv_freq": [],
    "rope_dim": 0,
    "rope_attention_factor": 1.0,
    "rope_interleave": False,
    "hidden_act": "silu",
    "gated": True,
    "mlp_bias": False,
    "intermediate_size": 128,
    "moe_layers": None,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 0,
    "shared_expert_gate": False,
    "num_experts": 0,
    "num_experts_per_tok": 0,
    "router": "topk",
    "router_score_function": "sigmoid",
    "router_bias": False,
    "gate_on_input": False,
    "n_group": 1,
    "topk_group": 1,
    "topk_scores_per_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "lm_head_bias": False,
    "initializer_range": 0.02,
    "use_cache": True,
}


class LitGPTMoEConfig(PretrainedConfig):
    """Sizes and choices of a model.

    Per layer are `attention_windows` (visible keys, or null for all), `attention_sinks` and `moe_layers` (true: an MoE
    layer, false: a dense one). `layer_types` and `sliding_window` say the same of windows in transformers' words.
    `qk_norm` is `none`, `head` or `whole` (over all heads together). `rope_inv_freq` holds the angle per position of
    each pair of rotated elements, so that no scaling rule is needed here; it is empty for models without rotary
    positions.
    """

    model_type = "litgpt_moe"
    keys_to_ignore_at_inference = [_CACHE]

    def __init__(self, **kwargs):
        for name, default in _SETTINGS.items():
            setattr(self, name, kwargs.pop(name, default))
        layers = self.num_hidden_layers
        if self.attention_scale is None:
            self.attention_scale = self.head_dim**-0.5
        self.attention_windows = self.attention_windows or [None] * layers
        self.attention_sinks = self.attention_sinks or [False] * layers
        self.moe_layers = self.moe_layers or [self.num_experts > 0] * layers
        self.layer_types = ["full_attention" if w is None else "sliding_attention" for w in self.attention_windows]
        self.sliding_window = next((w for w in self.attention_windows if w is not None), None)
        super().__init__(tie_word_embeddings=kwargs.pop("tie_word_embeddings", False), **kwargs)


class LitGPTMoERMSNorm(nn.Module):
    """Root-mean-square normalization, computed in float32."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight.to(wide.dtype)).to(x.dtype)


def _norm(config, size):
    return (LitGPTMoERMSNorm if config.norm == "rms" else nn.LayerNorm)(size, eps=config.norm_eps)


def _rotate(x_BHTd: Tensor, cos_BTd: Tensor, sin_BTd: Tensor, interleave: bool) -> Tensor:
    n = cos_BTd.size(-1)
    x, rest = x_BHTd[..., :n], x_BHTd[..., n:]
    cos, sin = cos_BTd.unsqueeze(1), sin_BTd.unsqueeze(1)
    if interleave:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    else:
        turned = torch.cat((-x[..., n // 2 :], x[..., : n // 2]), dim=-1)
    rotated = (x * cos + turned * sin).to(x_BHTd.dtype)
    return torch.cat((rotated, rest), dim=-1) if rest.size(-1) else rotated


class LitGPTMoEAttention(nn.Module):
    """Causal attention with grouped queries and, per head, an optional learned sink logit."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.scaling = config.attention_scale
        self.window = config.attention_windows[layer_idx]
        D, d = config.hidden_size, config.head_dim
        H, G = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(D, H * d, bias=config.attention_bias)
        self.k_proj = nn.Linear(D, G * d, bias=config.attention_bias)
        self.v_proj = nn.Linear(D, G * d, bias=config.attention_bias)
        self.o_proj = nn.Linear(H * d, D, bias=config.attention_out_bias)
        if config.qk_norm != "none":
            heads = (H, G) if config.qk_norm == "whole" else (1, 1)
            self.q_norm, self.k_norm = (_norm(config, n * d) for n in heads)
        self.sinks = nn.Parameter(torch.zeros(H)) if config.attention_sinks[layer_idx] else None

    def forward(self, x_BTD: Tensor, rope, visible_BTS: Tensor | None, cache, **kwargs) -> Tensor:
        d, qk_norm = self.config.head_dim, self.config.qk_norm
        q, k, v = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        if qk_norm == "whole":
            q, k = self.q_norm(q), self.k_norm(k)
        if (limit := self.config.clip_qkv) is not None:
            q, k, v = (x.clamp(-limit, limit) for x in (q, k, v))
        q, k, v = (x.unflatten(-1, (-1, d)).transpose(1, 2) for x in (q, k, v))
        if qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = (_rotate(x, *rope, self.config.rope_interleave) for x in (q, k))
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        if visible_BTS is None:
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
            y_BTD, _ = attend(self, q, k, v, None, scaling=self.scaling, s_aux=self.sinks, **kwargs)
            return self.o_proj(y_BTD.reshape(*x_BTD.shape[:2], -1))
        visible_BTS = visible_BTS if self.window is None else visible_BTS & self._in_window(visible_BTS)
        # For a layer with a window, a cache keeps only the keys that the next token sees.
        visible_BTS = visible_BTS[..., -k.size(2) :]
        if self.sinks is None:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=visible_BTS.unsqueeze(1), scale=self.scaling, enable_gqa=q.size(1) != k.size(1)
            )
        else:
            y = self._with_sinks(q, k, v, visible_BTS)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def _in_window(self, visible_BTS: Tensor) -> Tensor:
        T, S = visible_BTS.shape[1:]
        key_S = torch.arange(S, device=visible_BTS.device)
        return key_S > key_S[S - T :, None] - self.window

    def _with_sinks(self, q_BHTd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor, visible_BTS: Tensor) -> Tensor:
        G = k_BGSd.size(1)
        q_BGhTd = q_BHTd.unflatten(1, (G, -1))
        scores = (q_BGhTd * self.scaling) @ k_BGSd.unsqueeze(2).mT
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        scores = scores.masked_fill(~visible_BTS[:, None, None], -torch.inf)
        sink = self.sinks.to(scores.dtype).view(1, G, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat((scores, sink), dim=-1).softmax(dim=-1)[..., :-1]
        return (weights.to(v_BGSd.dtype) @ v_BGSd.unsqueeze(2)).flatten(1, 2)


class LitGPTMoEMLP(nn.Module):
    """A dense feed-forward network, with or without a gate."""

    def __init__(self, config, width):
        super().__init__()
        self.config = config
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias) if config.gated else None
        self.up_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        if self.gate_proj is None:
            return self.down_proj(_ACTIVATIONS[self.config.hidden_act](up))
        return self.down_proj(_gate(self.config, self.gate_proj(x), up))


class LitGPTMoERouter(nn.Module):
    """Chooses K experts per token and their weights; float32 whatever the model's type."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.num_experts)) if config.router_bias else None
        if config.router == "topk":
            bias_E = torch.zeros(config.num_experts, dtype=torch.float32)
            # Not DeepSeek's name: vLLM would take this for DeepSeek's router, and the groups for its groups.
            self.balancing_bias = nn.Parameter(bias_E, requires_grad=False)

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts, int64, and their weights, both (N, K)."""
        config, K = self.config, self.config.num_experts_per_tok
        dtype = torch.promote_types(x_ND.dtype, torch.float32)
        with torch.autocast(x_ND.device.type, enabled=False):
            bias_E = None if self.bias is None else self.bias.to(dtype)
            logits_NE = F.linear(x_ND.to(dtype), self.weight.to(dtype), bias_E)
        if config.router == "noisy_topk":
            best = logits_NE.topk(K, dim=-1)
            return best.indices, best.values.softmax(dim=-1) * config.routed_scaling_factor
        scores_NE = logits_NE.sigmoid() if config.router_score_function == "sigmoid" else logits_NE.softmax(dim=-1)
        biased_NE = scores_NE + self.balancing_bias
        if config.n_group > 1:
            groups_NGe = biased_NE.unflatten(-1, (config.n_group, -1))
            worth_NG = groups_NGe.topk(config.topk_scores_per_group, dim=-1).values.sum(dim=-1)
            best_Ng = worth_NG.topk(config.topk_group, dim=-1).indices
            closed_NG = torch.ones_like(worth_NG, dtype=torch.bool).scatter_(1, best_Ng, False)
            biased_NE = groups_NGe.masked_fill(closed_NG.unsqueeze(-1), -torch.inf).flatten(1)
        experts_NK = biased_NE.topk(K, dim=-1).indices
        weights_NK = scores_NE.gather(1, experts_NK)
        if config.norm_topk_prob:
            weights_NK = weights_NK / (weights_NK.sum(dim=-1, keepdim=True) + 1e-20)
        return experts_NK, weights_NK * config.routed_scaling_factor


class LitGPTMoEExperts(nn.Module):
    """Stacked feed-forward networks: `gate_up_proj` (E, 2F, D) or `up_proj` (E, F, D), and `down_proj` (E, D, F)."""

    def __init__(self, config):
        super().__init__()
        E, D, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.num_experts, self.config = E, config
        self.first, G = ("gate_up", 2 * width) if config.gated else ("up", width)
        self.register_parameter(f"{self.first}_proj", nn.Parameter(torch.zeros(E, G, D)))
        self.down_proj = nn.Parameter(torch.zeros(E, D, width))
        biased = config.mlp_bias
        self.register_parameter(f"{self.first}_bias", nn.Parameter(torch.zeros(E, G)) if biased else None)
        self.register_parameter("down_bias", nn.Parameter(torch.zeros(E, D)) if biased else None)

    def forward(self, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
        y_ND = weights_NK.new_zeros(x_ND.shape)
        if torch.compiler.is_compiling():
            # The chosen experts would be known too late, so every expert computes all tokens.
            for e in range(self.num_experts):
                chosen_NK = experts_NK == e
                y_ND = y_ND + self._weighted(e, x_ND, (weights_NK * chosen_NK).sum(-1), chosen_NK.any(-1))
            return y_ND.to(x_ND.dtype)
        for e in experts_NK.unique().tolist():
            token, place = torch.where(experts_NK == e)
            y_ND.index_add_(0, token, self._weighted(e, x_ND[token], weights_NK[token, place], None))
        return y_ND.to(x_ND.dtype)

    def _weighted(self, e: int, x_nD: Tensor, weight_n: Tensor, chosen_n: Tensor | None) -> Tensor:
        """Return an expert's weighted output, in the dtype of the weights; 0 for tokens that did not choose it."""
        gate_on_input, gated = self.config.gate_on_input, self.config.gated
        up_EGD, up_bias_EG = getattr(self, f"{self.first}_proj"), getattr(self, f"{self.first}_bias")
        weight_n1 = weight_n.unsqueeze(-1)
        if gate_on_input:
            x_nD = (x_nD * weight_n1).to(x_nD.dtype)
            weight_n1 = torch.ones_like(weight_n1) if chosen_n is None else chosen_n.to(weight_n.dtype).unsqueeze(-1)
        h = F.linear(x_nD, up_EGD[e], None if up_bias_EG is None else up_bias_EG[e])
        h = _gate(self.config, *h.chunk(2, dim=-1)) if gated else _ACTIVATIONS[self.config.hidden_act](h)
        return F.linear(h, self.down_proj[e], None if self.down_bias is None else self.down_bias[e]) * weight_n1


class LitGPTMoESparseMLP(nn.Module):
    """Routed experts, plus shared experts that every token visits."""

    def __init__(self, config):
        super().__init__()
        self.gate = LitGPTMoERouter(config)
        # vLLM replaces `experts` by its own, which are gated by SiLU and have no biases.
        fusible = config.gated and config.hidden_act == "silu" and not (config.mlp_bias or config.gate_on_input)
        self.experts_name = "experts" if fusible else "plain_experts"
        self.add_module(self.experts_name, LitGPTMoEExperts(config))
        width = config.shared_expert_intermediate_size
        self.shared_experts = LitGPTMoEMLP(config, width) if width else None
        gated = bool(width) and config.shared_expert_gate
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False) if gated else None

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        y_BTD = getattr(self, self.experts_name)(x_ND, *self.gate(x_ND)).view_as(x_BTD)
        if self.shared_experts is None:
            return y_BTD
        shared_BTD = self.shared_experts(x_BTD)
        if self.shared_expert_gate is not None:
            shared_BTD = shared_BTD * self.shared_expert_gate(x_BTD).sigmoid()
        return y_BTD + shared_BTD


class LitGPTMoEDecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward layer, each after a norm and with a residual connection."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.input_layernorm = _norm(config, config.hidden_size)
        self.self_attn = LitGPTMoEAttention(config, layer_idx)
        self.post_attention_layernorm = _norm(config, config.hidden_size)
        sparse = config.moe_layers[layer_idx]
        self.mlp = LitGPTMoESparseMLP(config) if sparse else LitGPTMoEMLP(config, config.intermediate_size)

    def forward(self, x_BTD: Tensor, rope, visible_BTS: Tensor | None, cache, **kwargs) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rope, visible_BTS, cache, **kwargs)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class LitGPTMoEPreTrainedModel(PreTrainedModel):
    """Loading and initialization."""

    config_class = LitGPTMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LitGPTMoEDecoderLayer"]
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config):
        super().__init__(config)
        # A balancing bias in bfloat16 would choose other experts.
        if any(config.moe_layers) and config.router == "topk":
            self._keep_in_fp32_modules = self._keep_in_fp32_modules_strict = ["balancing_bias"]

    def _init_weights(self, module):
        for name, parameter in module.named_parameters(recurse=False):
            if name.endswith(("bias", "sinks")):
                nn.init.zeros_(parameter)
            elif isinstance(module, (LitGPTMoERMSNorm, nn.LayerNorm)):
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=self.config.initializer_range)


class LitGPTMoEModel(LitGPTMoEPreTrainedModel):
    """Embeddings, decoder layers and the final norm."""

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        learned = config.learned_positions
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size) if learned else None
        self.layers = nn.ModuleList(LitGPTMoEDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = _norm(config, config.hidden_size)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        cache=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=None,
        return_dict=None,
        **kwargs,
    ):
        """Return the last hidden states (B, T, D), the cache if used, and all layers' hidden states if requested.

        The cache has either name in every version. Other arguments are for the attention of a serving engine.
        """
        cache = self._cache(past_key_values if cache is None else cache, use_cache)
        asked = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states = [] if asked else None
        x_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        past = 0 if cache is None else cache.get_seq_length()
        position_ids, visible_BTS = self._positions(x_BTD, past, attention_mask, position_ids)
        if self.embed_positions is not None:
            x_BTD = x_BTD + self.embed_positions(position_ids)
        rope = self._rope(position_ids)
        for layer in self.layers:
            if states is not None:
                states.append(x_BTD)
            x_BTD = layer(x_BTD, rope, visible_BTS, cache, **kwargs)
        x_BTD = self.norm(x_BTD)
        states = None if states is None else (*states, x_BTD)
        output = BaseModelOutputWithPast(last_hidden_state=x_BTD, hidden_states=states, **{_CACHE: cache})
        return output.to_tuple() if return_dict is False else output

    def _cache(self, given, use_cache):
        """Return the cache of a forward pass, a new one if none is given; None without a cache."""
        if given is not None and given.is_compileable:
            raise ValueError(f"{_CACHE}: a static cache has slots that are not filled yet; must be a DynamicCache")
        again = self.training and torch.is_grad_enabled()
        if again and any(layer.gradient_checkpointing for layer in self.layers):
            if given is not None and given.get_seq_length():
                raise ValueError(
                    f"{_CACHE}: layers that are computed again for their gradients would put their keys there twice; "
                    "must be left out, or switch gradient checkpointing off"
                )
            return None
        if given is None and (self.config.use_cache if use_cache is None else use_cache):
            return DynamicCache()
        return given

    def _positions(self, x_BTD: Tensor, past: int, attention_mask, position_ids) -> tuple[Tensor, Tensor | None]:
        """Return the positions of tokens, and which keys each one sees; None for the latter in a serving engine."""
        B, T = x_BTD.shape[:2]
        if self.config._attn_implementation == "vllm":
            return position_ids, None
        if attention_mask is not None and getattr(attention_mask, "ndim", None) != 2:
            raise ValueError("attention_mask: must have the shape (batch, keys), 1 for tokens and 0 for padding")
        slot_S = torch.arange(past + T, device=x_BTD.device)
        visible_BTS = (slot_S <= slot_S[past:, None]).expand(B, -1, -1)
        if attention_mask is not None:
            real_BS = attention_mask[:, : past + T].bool()
            # A padding query sees itself, so that its softmax is not empty.
            visible_BTS = visible_BTS & (real_BS[:, None] | (slot_S == slot_S[past:, None]))
            if position_ids is None:
                position_ids = (real_BS.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        return (slot_S[past:].expand(B, -1) if position_ids is None else position_ids), visible_BTS

    def _rope(self, position_BT: Tensor) -> tuple[Tensor, Tensor] | None:
        config = self.config
        if not config.rope_inv_freq:
            return None
        inv_freq = torch.tensor(config.rope_inv_freq, dtype=torch.float32, device=position_BT.device)
        angle = position_BT.float().unsqueeze(-1) * inv_freq
        angle = angle.repeat_interleave(2, -1) if config.rope_interleave else torch.cat((angle, angle), dim=-1)
        angle = angle[..., : config.rope_dim]
        return angle.cos() * config.rope_attention_factor, angle.sin() * config.rope_attention_factor


class LitGPTMoEForCausalLM(LitGPTMoEPreTrainedModel, GenerationMixin):
    """The model with its output head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = LitGPTMoEModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        cache=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_hidden_states=None,
        return_dict=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """Return logits (B, T, vocabulary), the loss if there are labels, and the results of the model without a head.

        Generation passes these arguments by name and needs them in the signature; other arguments are for the loss,
        such as the number of targets in all batches of a step.
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            cache=cache,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        found = {"hidden_states": output.hidden_states, _CACHE: getattr(output, _CACHE)}
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **found)
        return output.to_tuple() if return_dict is False else output
