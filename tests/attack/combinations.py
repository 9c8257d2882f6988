"""Models with any combination of settings, and what must be true of each.

`python -m tests.attack.combinations --count 1000` tries more of them than a test may, and prints what came of them.
"""

import contextlib
import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from litgpt import GPT, Config
from litgpt.utils import save_config
from torch import Tensor

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.export.hf.read import import_checkpoint
from litgpt_moe_ext.export.hf.write import export_checkpoint
from litgpt_moe_ext.model_size import count_parameters
from tests.attack.by_seed import try_seeds
from tests.export.hf.models import CASES, LATENT_SIZES, YARN, make_checkpoint

LENGTH = 20
CHANGES: tuple[dict[str, Any], ...] = (
    *({"mlp_activation": name} for name in ("swiglu", "clamped_swiglu", "geglu", "gelu", "relu", "relu2")),
    *({"gelu_approximate": name} for name in ("none", "tanh")),
    *({"router_type": name} for name in ("topk", "noisy_topk", "hash", "uniform")),
    *({"router_score_function": name} for name in ("sigmoid", "softmax")),
    *({"norm_topk_prob": value} for value in (True, False)),
    *({"n_expert": n, "n_expert_per_token": k} for n, k in ((1, 1), (4, 4), (8, 3))),
    *({"n_expert_groups": 4, "n_topk_groups": n, "n_topk_scores_per_group": 1} for n in (1, 3)),
    *({"rope_adjustments": keys} for keys in ({"factor": 2.0}, YARN, {**YARN, "attention_factor": 1.3})),
    {"rope_adjustments": {"factor": 4.0, "original_max_seq_len": 16, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    *({"attention_sinks": value} for value in (True, [True, False, False])),
    *({"sliding_window_size": size, "sliding_window_indices": [1, 0, 1]} for size in (1, 9)),
    *({"n_shared_expert": n} for n in (1, 2)),
    *({name: 1, "intermediate_size": 40} for name in ("first_k_dense_replace", "decoder_sparse_step")),
    {"mlp_only_layers": [1], "intermediate_size": 40},
    {"attention_document_boundary": "eos", "attention_document_token_id": 3},
    {"attention_class_name": None, "attention_sinks": None, **LATENT_SIZES},
    {"position_embedding": "learned", "rotary_percentage": 0.0},
    {"norm_qk": True, "norm_qk_type": "olmo2"},
    {"rope_local_base_freq": 300.0, "rope_indices": [0, 1, 0]},
    {"shared_expert_gate": True},
    {"shared_expert_intermediate_size": 28},
    {"expert_gate_on_input": True},
    {"router_bias": True},
    {"router_bias_update_rate": 0.0},
    {"routed_scaling_factor": 2.5},
    {"clip_qkv": 0.7},
    {"norm_qk": True},
    {"bias": True},
    {"attn_bias": True},
    {"lm_head_bias": True},
    {"norm_class_name": "LayerNorm"},
    {"rotary_percentage": 0.5},
    {"rope_interleave": True},
    {"rope_base": 500},
    {"rope_condense_ratio": 2},
    {"n_query_groups": 1},
    {"head_size": 16},
    {"attention_scores_scalar": 31},
    {"final_logit_softcapping": 5.0},
    {"scale_embeddings": True},
    {"parallel_residual": True},
    {"post_attention_norm": True},
)


def random_settings(chance: random.Random) -> dict[str, Any]:
    """Return settings of a model that can be exported, changed in up to four ways that go together."""
    settings = copy.deepcopy(CASES[chance.choice(sorted(CASES))][1])
    for change in chance.sample(CHANGES, chance.randint(0, 4)):
        changed = {**settings, **change}
        with contextlib.suppress(ValueError):  # of ours or of LitGPT's
            GPT(Config(**copy.deepcopy(changed)))
            settings = changed
    return settings


def attack(seed: int, folder: Path) -> Iterator[str]:
    """Check a model, and yield what could be checked.

    Args:
        seed: Of the settings.
        folder: For the checkpoint; must not be there.
    """
    settings = random_settings(random.Random(seed))
    model = make_checkpoint(folder, settings, biased=True)
    assert count_parameters(model.config).total == sum(parameter.numel() for parameter in model.parameters())
    idx_BT = torch.randint(4, 90, (2, LENGTH))
    if model.config.attention_document_boundary:
        idx_BT[:, 6] = 3
    check_passes(model.double(), idx_BT)
    yield "passes"
    check_slow_ways(model, settings, idx_BT)
    yield "slow ways"
    yield from check_export(model.float(), folder, idx_BT)


def check_passes(model: GPT, idx_BT: Tensor) -> None:
    """Check that no token sees those after it, and that a cache changes nothing."""
    others_BT = torch.cat((idx_BT[:, :13], torch.flip(idx_BT[:, 13:], (0, 1))), 1)
    with torch.inference_mode():
        whole, others = model(idx_BT), model(others_BT)
        close(others[:, :13], whole[:, :13], "tokens see those after them")
        model.set_kv_cache(2, dtype=torch.float64)
        steps = [model(idx_BT[:, :7], input_pos=torch.arange(7))]
        steps += [model(idx_BT[:, t : t + 1], input_pos=torch.tensor([t])) for t in range(7, LENGTH)]
        model.clear_kv_cache()
    close(torch.cat(steps, 1), whole, "a cache changes something")


def check_slow_ways(model: GPT, settings: dict[str, Any], idx_BT: Tensor) -> None:
    """Check logits and gradients against the written-out softmax and one expert after the other."""
    slow = {"attention_backend": "eager"} if model.config.attention_class_name else {}
    if model.config.router_type:
        slow["expert_backend"] = "loop"
    reference = GPT(Config(**{**settings, **slow})).double()
    reference.load_state_dict(model.state_dict())
    results = []
    for each in (model, reference.eval()):
        logits = each(idx_BT)
        logits.logsumexp(-1).sum().backward()
        results.append({"logits": logits.detach(), **{n: p.grad for n, p in each.named_parameters()}})
        each.zero_grad()
    for name, theirs in results[1].items():
        ours = results[0][name]
        assert (ours is None) == (theirs is None), f"{name} has a gradient in one way only"
        if ours is not None:
            close(ours, theirs, f"fast and slow ways differ in {name}")


def check_export(model: GPT, folder: Path, idx_BT: Tensor) -> Iterator[str]:
    """Check that transformers computes the same, or that the export is refused, and that the import is the model."""
    save_config(model.config, folder)
    try:
        export_checkpoint(folder, folder / "hf")
    except SettingsError:
        yield "refused to export"
        return
    # The end of a document in the middle of a text is nothing to an export.
    idx_BT = idx_BT.masked_fill(idx_BT == 3, 4)
    exported = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", trust_remote_code=True).eval()
    with torch.inference_mode():
        logits = model(idx_BT)
        close(exported(idx_BT).logits[..., : logits.size(-1)], logits, f"{type(exported).__name__} differs", 3e-4)
        yield type(exported).__name__
        if "auto_map" in exported.config.to_dict():
            return
        back = GPT(import_checkpoint(folder / "hf", folder / "back").config).eval()
        back.load_state_dict(torch.load(folder / "back" / "lit_model.pth", weights_only=True))
        close(back(idx_BT)[..., : logits.size(-1)], logits, "the import differs")
    yield "imported"


def close(ours: Tensor, theirs: Tensor, what: str, error: float = 1e-5) -> None:
    """Check that numbers differ by a small part of the largest only; norms are computed in float32."""
    difference, largest = (ours - theirs).abs().max().item(), max(theirs.abs().max().item(), 1e-3)
    assert difference <= error * largest, f"{what}: {difference:.1e} of {largest:.1e}"


if __name__ == "__main__":
    try_seeds(__doc__, 200, attack)
