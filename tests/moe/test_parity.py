"""The MoE layers against Hugging Face's and LitGPT's modules with the same weights: outputs and every gradient.

The references round the gate values to float32 inside, so that float64 comparisons agree to float32's last digits only;
`test_exact_against_plain_sum` has no such limit.
"""

import pytest
import torch
import torch.nn.functional as F
from litgpt.model import LLaMAMoE
from litgpt.utils import lazy_load

from litgpt_moe_ext.moe.expert_layouts import stack_experts, unstack_experts
from litgpt_moe_ext.moe.layer import NoisyTopKMoE, SharedExpertMoE
from tests.models import moe_config, noisy_config, randomize

TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}


def assert_same_gradients(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def gradients(
    module: torch.nn.Module, x: torch.Tensor, upstream: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the output and the gradients of all parameters and of the input."""
    x = x.detach().requires_grad_()
    output = module(x)
    output = output[0] if isinstance(output, tuple) else output
    output.backward(upstream)
    # An expert without tokens has a gradient of zero in the stacked layout and none in a list of modules.
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in module.named_parameters()}
    return output.detach(), {**found, "input": x.grad}


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)


def from_hugging_face(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the weights of Hugging Face's MoE blocks to LitGPT's per-expert names."""
    names = {"gate_proj": "fc_1", "up_proj": "fc_2", "down_proj": "proj", "w1": "fc_1", "w3": "fc_2", "w2": "proj"}
    names["shared_expert"] = "shared_experts"
    return {".".join(names.get(part, part) for part in name.split(".")): weight for name, weight in weights.items()}


def check_parity(ours, theirs, shape, dtype, translate=from_hugging_face):
    """Compare outputs and all gradients after copying the weights of a Hugging Face block, translated."""
    ours.load_state_dict({"gate.e_score_correction_bias": torch.zeros(8), **translate(theirs.state_dict())})
    x, upstream = inputs(shape, dtype)
    our_output, our_gradients = gradients(ours, x, upstream)
    their_output, their_gradients = gradients(theirs, x, upstream)
    torch.testing.assert_close(our_output, their_output, **TOLERANCE)
    expected = {**translate(their_gradients), "input": their_gradients["input"]}
    assert_same_gradients(unstack_experts(our_gradients), unstack_experts(expected), **TOLERANCE)


# A single token visits 2 of 8 experts: 6 experts receive none.
@pytest.mark.parametrize("shape", [(2, 17, 16), (1, 1, 16)], ids=["batch", "one token"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bias": True},
        {"n_shared_expert": 2},
        {"n_expert": 1, "n_expert_per_token": 1},
        {"n_expert": 3, "n_expert_per_token": 3},
        {"routed_scaling_factor": 2.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("cls", [SharedExpertMoE, NoisyTopKMoE])
def test_equals_llama_moe(settings, shape, cls):
    """LitGPT takes the softmax of the k best logits: softmax scores, normalised; or noisy top-k without its noise."""
    if cls is SharedExpertMoE:
        config = moe_config(router_score_function="softmax", norm_topk_prob=True, **settings)
    else:
        config = noisy_config(**settings)
    ours = randomize(cls(config).double()).eval()
    theirs = LLaMAMoE(config).double()
    weights = unstack_experts(ours.state_dict())
    theirs.load_state_dict(
        {n: w for n, w in weights.items() if n not in ("gate.e_score_correction_bias", "gate.noise_weight")}
    )

    x, upstream = inputs(shape, torch.float64)
    our_output, our_gradients = gradients(ours, x, upstream)
    their_output, their_gradients = gradients(theirs, x, upstream)

    torch.testing.assert_close(our_output, their_output, **TOLERANCE)
    our_gradients.pop("gate.noise_weight", None)
    assert_same_gradients(unstack_experts(our_gradients), their_gradients, **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("groups", [(4, 2), (2, 1), None], ids=str)
def test_equals_deepseek_v3(dtype, normalize, groups):
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    n_group, topk_group = groups or (1, 1)
    theirs = randomize(
        DeepseekV3MoE(
            DeepseekV3Config(
                hidden_size=16,
                moe_intermediate_size=12,
                n_routed_experts=8,
                num_experts_per_tok=3,
                n_shared_experts=2,
                n_group=n_group,
                topk_group=topk_group,
                norm_topk_prob=normalize,
                routed_scaling_factor=2.5,
            )
        ).to(dtype)
    )
    # Its gate returns float32, which its experts cannot add to float64.
    theirs.gate.register_forward_hook(lambda _module, _inputs, output: (output[0], output[1].to(dtype)))
    # A positive bias: with negative biased scores Hugging Face lets experts of unselected groups win (it masks with 0).
    theirs.gate.e_score_correction_bias.copy_(torch.rand(8))
    settings = (
        {}
        if groups is None
        else {"n_expert_groups": n_group, "n_topk_groups": topk_group, "n_topk_scores_per_group": 2}
    )
    config = moe_config(
        n_expert_per_token=3, n_shared_expert=2, norm_topk_prob=normalize, routed_scaling_factor=2.5, **settings
    )
    check_parity(SharedExpertMoE(config).to(dtype), theirs, (2, 19, 16), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_mixtral(dtype):
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    theirs = randomize(
        MixtralSparseMoeBlock(
            MixtralConfig(hidden_size=16, intermediate_size=12, num_local_experts=8, num_experts_per_tok=2)
        ).to(dtype)
    )
    ours = SharedExpertMoE(moe_config(router_score_function="softmax", norm_topk_prob=True)).to(dtype)
    check_parity(ours, theirs, (2, 3, 16), dtype)


SHAPES = pytest.mark.parametrize("shape", [(2, 7, 16), (1, 1, 16)], ids=["odd", "one token"])


@SHAPES
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("top_k", [3, 8])
def test_equals_qwen2_moe(top_k, normalize, shape):
    """Shared experts behind a sigmoid gate, with a width of their own."""
    from transformers import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    sizes = {"hidden_size": 16, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20, "num_experts": 8}
    hf_config = Qwen2MoeConfig(**sizes, num_experts_per_tok=top_k, norm_topk_prob=normalize)
    config = moe_config(
        n_expert_per_token=top_k,
        router_score_function="softmax",
        norm_topk_prob=normalize,
        n_shared_expert=1,
        shared_expert_intermediate_size=20,
        shared_expert_gate=True,
    )
    theirs = randomize(Qwen2MoeSparseMoeBlock(hf_config).double())
    check_parity(SharedExpertMoE(config).double(), theirs, shape, torch.float64)


@SHAPES
@pytest.mark.parametrize("normalize", [True, False])
def test_equals_qwen3_moe(normalize, shape):
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    sizes = {"hidden_size": 16, "moe_intermediate_size": 12, "num_experts": 8}
    hf_config = Qwen3MoeConfig(**sizes, num_experts_per_tok=3, norm_topk_prob=normalize)
    config = moe_config(n_expert_per_token=3, router_score_function="softmax", norm_topk_prob=normalize)
    theirs = randomize(Qwen3MoeSparseMoeBlock(hf_config).double())
    check_parity(SharedExpertMoE(config).double(), theirs, shape, torch.float64)


@SHAPES
@pytest.mark.parametrize("groups", [(4, 2), None], ids=str)
def test_equals_deepseek_v2(groups, shape):
    """Softmax scores that are not normalised; a group is worth its best expert."""
    from transformers import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2MoE

    hf_config = DeepseekV2Config(
        hidden_size=16,
        moe_intermediate_size=12,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_shared_experts=2,
        topk_method="group_limited_greedy" if groups else "greedy",
        n_group=groups[0] if groups else None,
        topk_group=groups[1] if groups else None,
        routed_scaling_factor=1.5,
    )
    settings = {"n_expert_groups": 4, "n_topk_groups": 2, "n_topk_scores_per_group": 1} if groups else {}
    config = moe_config(
        n_expert_per_token=3, n_shared_expert=2, router_score_function="softmax", routed_scaling_factor=1.5, **settings
    )
    theirs = randomize(DeepseekV2MoE(hf_config))
    check_parity(SharedExpertMoE(config), theirs, shape, torch.float32)


@SHAPES
@pytest.mark.parametrize("normalize", [True, False])
def test_equals_glm4_moe(normalize, shape):
    from transformers import Glm4MoeConfig
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMoE

    hf_config = Glm4MoeConfig(
        hidden_size=16,
        moe_intermediate_size=12,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        norm_topk_prob=normalize,
        routed_scaling_factor=2.5,
    )
    theirs = randomize(Glm4MoeMoE(hf_config))
    theirs.gate.e_score_correction_bias.copy_(torch.rand(8))
    config = moe_config(
        n_expert_per_token=3,
        n_shared_expert=1,
        n_expert_groups=2,
        n_topk_groups=1,
        n_topk_scores_per_group=2,
        norm_topk_prob=normalize,
        routed_scaling_factor=2.5,
    )
    check_parity(SharedExpertMoE(config), theirs, shape, torch.float32)


@SHAPES
def test_equals_gpt_oss(shape):
    """Router with a bias, and experts whose projections are limited: the inputs are large enough for that."""
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

    def translate(tensors):
        up, bias = tensors["experts.gate_up_proj"].mT, tensors["experts.gate_up_proj_bias"]
        return {
            "gate.weight": tensors["router.weight"],
            "gate.bias": tensors["router.bias"],
            "experts.gate_up_proj": torch.cat([up[:, ::2], up[:, 1::2]], dim=1),
            "experts.gate_up_bias": torch.cat([bias[:, ::2], bias[:, 1::2]], dim=1),
            "experts.down_proj": tensors["experts.down_proj"].mT,
            "experts.down_bias": tensors["experts.down_proj_bias"],
        }

    sizes = {"hidden_size": 16, "intermediate_size": 12, "num_local_experts": 8, "num_experts_per_tok": 3}
    theirs = randomize(GptOssMLP(GptOssConfig(**sizes)).double(), std=2.0)
    config = moe_config(
        n_expert_per_token=3,
        router_score_function="softmax",
        norm_topk_prob=True,
        router_bias=True,
        mlp_activation="clamped_swiglu",
        bias=True,
    )
    check_parity(SharedExpertMoE(config).double(), theirs, shape, torch.float64, translate)


@SHAPES
@pytest.mark.parametrize("backend", ["loop", "grouped_cpu", "grouped_mm"])
def test_equals_llama4(shape, backend):
    """The gate value multiplies the expert's input."""
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

    def translate(tensors):
        return {
            "gate.weight": tensors["router.weight"],
            "experts.gate_up_proj": tensors["experts.gate_up_proj"].mT,
            "experts.down_proj": tensors["experts.down_proj"].mT,
            **{
                f"shared_experts.{ours}.weight": tensors[f"shared_expert.{theirs}.weight"]
                for ours, theirs in {"fc_1": "gate_proj", "fc_2": "up_proj", "proj": "down_proj"}.items()
            },
        }

    sizes = {"hidden_size": 16, "intermediate_size": 12, "num_local_experts": 8, "num_experts_per_tok": 2}
    theirs = randomize(Llama4TextMoe(Llama4TextConfig(**sizes)))
    config = moe_config(n_expert_per_token=2, n_shared_expert=1, expert_gate_on_input=True, expert_backend=backend)
    forward = theirs.forward
    theirs.forward = lambda x: forward(x)[0].view(x.shape)
    check_parity(SharedExpertMoE(config), theirs, shape, torch.float32, translate)


def test_equals_litgpts_grouped_moe():
    """With positive biased scores, where its mask of 0 does no harm."""
    groups = {"n_expert_groups": 4, "n_topk_groups": 2, "n_topk_scores_per_group": 2}
    config = moe_config(n_expert_per_token=3, norm_topk_prob=True, n_shared_expert=1, bias=True, **groups)
    theirs = randomize(LLaMAMoE(config))
    theirs.gate.e_score_correction_bias.copy_(torch.rand(8))
    check_parity(SharedExpertMoE(config), theirs, (2, 7, 16), torch.float32)


@pytest.mark.parametrize("activation", ["gelu", "geglu", "relu", "relu2"])
def test_activations_are_the_usual_ones(activation):
    """Two shared experts and K = E, so that the layer is a plain sum of networks written down by hand."""
    config = moe_config(n_expert=2, n_shared_expert=1, mlp_activation=activation, bias=True)
    moe = randomize(SharedExpertMoE(config).double())
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    functions = {"gelu": F.gelu, "geglu": F.gelu, "relu": F.relu, "relu2": lambda h: F.relu(h) ** 2}

    def network(x, up, up_bias, down, down_bias):
        h = x @ up.T + up_bias
        gate, factor = h.chunk(2, -1) if activation == "geglu" else (h, 1.0)
        return (functions[activation](gate) * factor) @ down.T + down_bias

    scores = (x @ moe.gate.weight.T).sigmoid()
    expected = sum(scores[..., e : e + 1] * network(x, *(w[e] for w in moe.experts.weights)) for e in range(2))
    shared = moe.shared_experts
    up = (shared.fc_1, shared.fc_2) if activation == "geglu" else (shared.fc,)
    expected = expected + network(
        x, torch.cat([u.weight for u in up]), torch.cat([u.bias for u in up]), shared.proj.weight, shared.proj.bias
    )
    torch.testing.assert_close(moe(x), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
def test_exact_against_plain_sum(score_function):
    """The definition, written down token by token, to float64's last digits."""
    config = moe_config(router_score_function=score_function, n_shared_expert=1)
    moe = randomize(SharedExpertMoE(config).double())
    moe.gate.e_score_correction_bias.normal_()
    x = torch.randn(2, 5, 16, dtype=torch.float64)

    expected = torch.empty_like(x)
    for index in torch.cartesian_prod(torch.arange(2), torch.arange(5)):
        token = x[tuple(index)]
        logits = moe.gate.weight @ token
        scores = logits.sigmoid() if score_function == "sigmoid" else logits.softmax(0)
        chosen = (scores + moe.gate.e_score_correction_bias).topk(2).indices
        output = moe.shared_experts(token)
        for e in chosen:
            gate, up = (moe.experts.gate_up_proj[e] @ token).chunk(2)
            output = output + scores[e] * (moe.experts.down_proj[e] @ (F.silu(gate) * up))
        expected[tuple(index)] = output

    torch.testing.assert_close(moe(x), expected, atol=1e-12, rtol=1e-12)


def test_gradcheck():
    """Analytic gradients equal numerical ones, with experts that receive no token among them."""
    moe = randomize(
        SharedExpertMoE(moe_config(n_embd=4, n_head=1, n_query_groups=1, moe_intermediate_size=3)).double(), std=1.0
    )
    x = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    parameters = dict(moe.named_parameters())

    def run(x, *values):
        return torch.func.functional_call(moe.eval(), dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters.values()))


def test_per_expert_layout_round_trip():
    moe = randomize(SharedExpertMoE(moe_config(bias=True)))
    per_expert = unstack_experts(moe.state_dict())
    assert "experts.7.fc_2.weight" in per_expert
    assert "experts.0.proj.bias" in per_expert
    stack_experts(per_expert, "experts.", 8)
    assert per_expert.keys() == moe.state_dict().keys()
    assert all(torch.equal(per_expert[name], weight) for name, weight in moe.state_dict().items())


@pytest.mark.parametrize(
    "make",
    [lambda: moe_config(router_score_function="softmax", norm_topk_prob=True), noisy_config],
    ids=["softmax", "noisy"],
)
def test_weights_of_llama_moe_load_from_a_file(make, tmp_path):
    """As LitGPT's commands load them, tensor by tensor, into a whole model."""
    config = make()
    theirs = randomize(LLaMAMoE(config))
    torch.save({f"0.{name}": weight for name, weight in theirs.state_dict().items()}, tmp_path / "weights.pth")
    ours = torch.nn.Sequential(randomize(config.mlp_class(config))).eval()
    ours.load_state_dict(lazy_load(tmp_path / "weights.pth"))
    x = torch.randn(2, 7, 16)
    torch.testing.assert_close(ours(x), theirs(x), **TOLERANCE)
    stacked = {
        name: weight for name, weight in ours.state_dict().items() if "noise" not in name and "_bias" not in name
    }
    with pytest.raises(RuntimeError, match="Missing key"):
        ours.load_state_dict(stacked)  # the bias of a checkpoint of our own must be there


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_ungated_per_expert_layout_round_trip(activation, bias):
    moe = randomize(SharedExpertMoE(moe_config(bias=bias, mlp_activation=activation)))
    per_expert = unstack_experts(moe.state_dict())
    assert {"experts.7.fc.weight", "experts.0.proj.weight"} <= per_expert.keys()
    other = SharedExpertMoE(moe_config(bias=bias, mlp_activation=activation))
    other.load_state_dict(per_expert)
    assert all(torch.equal(other.state_dict()[name], weight) for name, weight in moe.state_dict().items())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bfloat16_stays_close_to_float32(precision):
    moe = randomize(SharedExpertMoE(moe_config(n_shared_expert=1)), std=0.2)
    x = torch.randn(2, 16, 16)
    expected = moe(x)
    if precision == "bf16-mixed":
        with torch.autocast("cpu", torch.bfloat16):
            output = moe(x)
    else:
        output = moe.bfloat16()(x.bfloat16())
        assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, atol=0.02, rtol=0.05)
