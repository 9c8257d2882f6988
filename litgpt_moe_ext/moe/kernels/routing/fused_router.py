"""Fused routers on a GPU: the decision, losses and statistics of the package's own routers in few launches.

The reference is `litgpt_moe_ext.moe.routing.router` and its subclasses, which use torch's operators. It also runs on
CPUs, under compilers, for routers and losses of other packages, and with `expert_backend: loop`.

Shape legend: T tokens, E experts, K chosen experts per token, R = T * K routed rows, S sequences, N numbers of a tally,
L = 3 rows of slopes, S more of them with a loss per sequence.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from litgpt_moe_ext.kernels.launch import power_of_two, triton_works_on
from litgpt_moe_ext.kernels.operator import define
from litgpt_moe_ext.moe.balancing.gradient_injection import present_scale
from litgpt_moe_ext.moe.balancing.step_shares import StepShares

# More experts do not fit into the registers of a block.
MOST_EXPERTS = 1024


class Rule(NamedTuple):
    """How experts are chosen, and the weights of the losses.

    Attributes:
        score: `sigmoid` or `softmax` of the logits; `chosen`: the softmax of the chosen logits, with noise; `even`: the
            same gate value for all chosen experts.
        top_k: K.
        normalize: Whether gate values are divided by their sum.
        scale: Factor of the gate values.
        groups: Number of groups of experts; 1 without.
        best_groups: How many groups take part.
        best_in_group: How many of a group's best scores make up its value.
        balancing: Weight of the load-balancing loss.
        sequence: Weight of the load-balancing loss of each sequence.
        z: Weight of the z-loss.
        importance: Weight of the importance loss.
        load: Weight of the load loss.
        global_batch: Whether the load-balancing loss is over the global batch, whose shares are known later.
        sequences: Number of sequences, of equal length, that tokens are from; 1 if no loss needs it.
    """

    score: str
    top_k: int
    normalize: bool = False
    scale: float = 1.0
    groups: int = 1
    best_groups: int = 1
    best_in_group: int = 1
    balancing: float = 0.0
    sequence: float = 0.0
    z: float = 0.0
    importance: float = 0.0
    load: float = 0.0
    global_batch: bool = False
    sequences: int = 1

    @property
    def coefs(self) -> tuple[float, ...]:
        """Weights of the losses, in the order in which a router records them."""
        return self.balancing, self.sequence, self.z, self.importance, self.load


class Given(NamedTuple):
    """Inputs of a decision.

    Attributes:
        logits_TE: Logits, float32, contiguous; for `even` any numbers, such as hashes.
        bias_E: Balancing bias, float32, or None.
        noise_TE: Standard normal noise, or None.
        spread_TE: Its standard deviation before the softplus, contiguous, or None.
        real_T: Which tokens are not padding, bool, contiguous; None if all.
        other_loss: A loss that does not look at tokens, with its weight, a scalar, or None.
    """

    logits_TE: Tensor
    bias_E: Tensor | None = None
    noise_TE: Tensor | None = None
    spread_TE: Tensor | None = None
    real_T: Tensor | None = None
    other_loss: Tensor | None = None


class Decision(NamedTuple):
    """The result of a decision.

    Attributes:
        weights_TK: Gate values, float32; 0 for padding.
        experts_TK: Chosen experts, int64; E for padding.
        counts_E: Tokens per expert, int64.
        ends_E: Where the rows of each expert end, int32.
        rows_R: For each row, ordered by expert and then by token, its index among the T * K choices, int64; padding
            comes last.
        slopes_LE: Gradients of the load-balancing loss by each expert's mean probability (for the global batch: the sum
            of the probabilities instead), of the importance loss by the sum of its gate values, and of the load loss
            by its expected tokens; with a loss per sequence, then a row like the first for each sequence.
        tally_N: What a router sums over a step, float64; empty unless training.
    """

    weights_TK: Tensor
    experts_TK: Tensor
    counts_E: Tensor
    ends_E: Tensor
    rows_R: Tensor
    slopes_LE: Tensor
    tally_N: Tensor


def works_on(x: Tensor) -> bool:
    """Return whether a router's decision for `x` can be made here: on a GPU, in float32."""
    # The logits of float64 tokens are float64, whatever the dtype of the gate.
    return x.is_cuda and x.dtype != torch.float64 and not torch.compiler.is_compiling() and triton_works_on(x.device)


def decide(given: Given, rule: Rule, leaf_N: Tensor | None, shares: StepShares | None) -> Decision:
    """Choose experts for each token.

    Args:
        given: Inputs of the decision.
        rule: The rule to follow.
        leaf_N: The leaf of a router's tally, whose "gradient" becomes the tally; None unless training.
        shares: Shares of the global batch, for a load-balancing loss over it.
    """
    return Decision(*_Decide.apply(rule, shares, leaf_N, *given))


def block_shape(n_expert: int) -> tuple[int, int]:
    """Return the tokens and experts of a program's block: as many as fit into registers."""
    width = max(power_of_two(n_expert), 4)
    return min(max(2048 // width, 1), 64), width


class _Decide(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rule: Rule, shares: StepShares | None, leaf_N: Tensor | None, *given: Tensor | None
    ) -> tuple[Tensor, ...]:
        decision = Decision(*route_operator(*given, *rule, leaf_N is not None))
        ctx.rule, ctx.shares = rule, shares
        # The random numbers of a router that does not learn are not kept.
        kept = given if any(ctx.needs_input_grad[3:]) else (None,) * _N_GIVEN
        ctx.save_for_backward(*kept, *decision[1:])
        ctx.mark_non_differentiable(*decision[1:])
        ctx.set_materialize_grads(False)
        return decision

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        saved, dweights_TK = ctx.saved_tensors, grads[0]
        if dweights_TK is None:
            return (None,) * (3 + _N_GIVEN)
        given, decision = saved[:_N_GIVEN], Decision(dweights_TK, *saved[_N_GIVEN:])
        if ctx.rule.global_batch:
            decision = _with_shares(decision, ctx.rule, ctx.shares.shares(decision.counts_E))
        _, _, need_leaf, *need = ctx.needs_input_grad
        tally_N = decision.tally_N if need_leaf else None
        if not any(need):
            return None, None, tally_N, *(None,) * _N_GIVEN
        scale = present_scale(dweights_TK)
        upstream = (decision.experts_TK, decision.ends_E, decision.slopes_LE, dweights_TK.contiguous(), scale)
        dlogits_TE, dspread_TE = _route_backward(*given, *ctx.rule, *upstream)
        if need[-1] and saved[_REAL] is not None:
            scale = scale * decision.ends_E[-1].clamp(max=1)  # padding alone has no loss
        gradients = Given(dlogits_TE, spread_TE=dspread_TE, other_loss=scale)
        needed = (gradient if asked else None for gradient, asked in zip(gradients, need, strict=True))
        return None, None, tally_N, *needed


def _with_shares(decision: Decision, rule: Rule, shares_E: Tensor) -> Decision:
    # Add the load-balancing loss over the global batch, whose shares the kernels did not know.
    n_expert = shares_E.size(0)
    slope_E = rule.balancing * n_expert * shares_E
    slopes_LE, tally_N = decision.slopes_LE.clone(), decision.tally_N.clone()
    tally_N[n_expert + 3] = slope_E.dot(slopes_LE[0].to(slope_E.dtype))
    slopes_LE[0] = slope_E
    return decision._replace(slopes_LE=slopes_LE, tally_N=tally_N)


_N_GIVEN, _N_RULE = len(Given._fields), len(Rule._fields)
_REAL = Given._fields.index("real_T")


def _kernels() -> Any:
    from litgpt_moe_ext.moe.kernels.triton.routing import launches

    return launches


def _run_route(*arguments: Any) -> tuple[Tensor, ...]:
    given, rule = Given(*arguments[:_N_GIVEN]), Rule(*arguments[_N_GIVEN:-1])
    return _kernels().route(given, rule, arguments[-1])


def _run_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    given, rule = Given(*arguments[:_N_GIVEN]), Rule(*arguments[_N_GIVEN : _N_GIVEN + _N_RULE])
    return _kernels().route_backward(given, rule, *arguments[_N_GIVEN + _N_RULE :])


def _empty_decision(*arguments: Any) -> tuple[Tensor, ...]:
    given, rule, trains = Given(*arguments[:_N_GIVEN]), Rule(*arguments[_N_GIVEN:-1]), arguments[-1]
    n_token, n_expert = given.logits_TE.shape
    new = functools.partial(given.logits_TE.new_empty, dtype=torch.float32)
    n_loss = sum(coef != 0 for coef in rule.coefs) + (given.other_loss is not None)
    return (
        new(n_token, rule.top_k),
        new(n_token, rule.top_k, dtype=torch.int64),
        new(n_expert, dtype=torch.int64),
        new(n_expert, dtype=torch.int32),
        new(n_token * rule.top_k, dtype=torch.int64),
        new(3 + (rule.sequences if rule.sequence else 0), n_expert),
        new(n_expert + 3 + n_loss if trains else 0, dtype=torch.float64),
    )


def _empty_gradients(*arguments: Any) -> tuple[Tensor, Tensor]:
    logits_TE, spread_TE = arguments[0], arguments[3]
    return torch.empty_like(logits_TE), logits_TE.new_empty(0 if spread_TE is None else logits_TE.shape)


_ARGUMENTS = Given.__annotations__ | Rule.__annotations__
# Public, because checkpointing keeps its results.
route_operator = define("route", _ARGUMENTS | {"trains": bool}, len(Decision._fields), _run_route, _empty_decision)
_route_backward = define(
    "route_backward",
    _ARGUMENTS | dict.fromkeys(("experts_TK", "ends_E", "slopes_LE", "dweights_TK", "loss_scale"), Tensor),
    2,
    _run_backward,
    _empty_gradients,
)
