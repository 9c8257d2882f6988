"""What all routers share: the routing they return, auxiliary losses, and the choice between kernels and operators.

Shape legend: T tokens, D model width, E experts, K chosen experts per token.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from litgpt_moe_ext.moe.balancing.bias import watch
from litgpt_moe_ext.moe.balancing.gradient_injection import inject
from litgpt_moe_ext.moe.balancing.step_shares import StepShares
from litgpt_moe_ext.moe.balancing.tally import Tally
from litgpt_moe_ext.moe.batch_metadata import TokenIds
from litgpt_moe_ext.moe.kernels.routing import fused_router
from litgpt_moe_ext.moe.kernels.routing.fused_router import Decision, Given, Rule
from litgpt_moe_ext.moe.kernels.routing.orthogonality import Directions, weighted_orthogonality
from litgpt_moe_ext.moe.registry import LOSSES, load, loss_field
from litgpt_moe_ext.moe.routing.record import SUMS, Counted, StepLoss, count_in_backward, tokens_per_expert

if TYPE_CHECKING:
    from litgpt_moe_ext.config.types import Config

# The loss that can be computed over the global batch.
_STEP_LOSS = "load_balancing_loss"
# The losses that the fused kernels compute, with their fields in `Rule`, in the order of the record.
_FUSED_LOSSES = {
    "load_balancing_loss": "balancing",
    "sequence_balancing_loss": "sequence",
    "z_loss": "z",
    "importance_loss": "importance",
    "load_loss": "load",
}
# The last one in the record. It depends on the weights only, and has a kernel of its own.
_WEIGHT_LOSS = "orthogonality_loss"
_LOSSES = "litgpt_moe_ext.moe.balancing.losses"


class Passed(NamedTuple):
    """A router's input tokens, cast to the dtype of the experts' products.

    Attributes:
        routed_TD: For the routed experts.
        shared_TD: For the shared experts: the same values in a separate tensor, so that the router's backward pass, not
            autograd, adds up the gradients of both.
    """

    routed_TD: Tensor
    shared_TD: Tensor


class Routing(NamedTuple):
    """The decision of a router for a batch of tokens.

    Attributes:
        weights_TK: Gate value of every chosen expert, float32 or float64, differentiable.
        experts_TK: Index of every chosen expert, int64; distinct for each token, in no particular order. For padding E,
            which is no expert's index.
        counts_E: Tokens per expert, int64; padding is not counted.
        real_T: Which tokens are not padding, bool; None if all.
        decision: The full result of the fused kernels, if they made the decision.
        passed: The experts' input, if the router produces it as a by-product.
    """

    weights_TK: Tensor
    experts_TK: Tensor
    counts_E: Tensor
    real_T: Tensor | None = None
    decision: Decision | None = None
    passed: Passed | None = None


class Choice(NamedTuple):
    """The choice of a router's rule, and the numbers that it is based on.

    Attributes:
        weights_TK: Gate values before `routed_scaling_factor`.
        experts_TK: Chosen experts, int64.
        logits_TE: Router logits without noise; None for a router without logits.
        scores_TE: Positive scores of all experts, such as the sigmoid of the logits; the softmax of the logits if None.
        noisy_TE: Logits with noise; None without noise.
        std_TE: Standard deviation of the noise; None without noise.
    """

    weights_TK: Tensor
    experts_TK: Tensor
    logits_TE: Tensor | None = None
    scores_TE: Tensor | None = None
    noisy_TE: Tensor | None = None
    std_TE: Tensor | None = None

    def probabilities(self) -> Tensor:
        """Return the scores of all experts, (T, E), with rows that sum to 1, as balancing losses use them."""
        if self.scores_TE is None:
            assert self.logits_TE is not None
            return self.logits_TE.softmax(dim=-1)
        return self.scores_TE / (self.scores_TE.sum(dim=-1, keepdim=True) + 1e-20)

    def route_nowhere(self, padding_T: Tensor, n_expert: int) -> "Choice":
        """Return the choice with the tokens of `padding_T` (bool) sent to expert `n_expert`, at weight 0."""
        padding_T1 = padding_T.unsqueeze(1)
        weights_TK = self.weights_TK.masked_fill(padding_T1, 0.0)
        return self._replace(weights_TK=weights_TK, experts_TK=self.experts_TK.masked_fill(padding_T1, n_expert))

    def rows(self, keep_T: Tensor) -> "Choice":
        """Return the choice for the tokens of `keep_T` (bool); waits for the device."""
        given = {name: values[keep_T] for name, values in self._asdict().items() if values is not None}
        return self._replace(**given)


class Router(nn.Module):
    """Chooses experts by a rule that subclasses implement in `choose`.

    Args:
        config: A configuration that passed `litgpt_moe_ext.config.rules.resolve`; uses `n_expert`,
            `n_expert_per_token`, `routed_scaling_factor`, `expert_backend` and the fields of the losses.

    Attributes:
        weight: The gate, (E, D), or None for a router that does not learn.
        tally: Tokens per expert and sums since the last optimizer step.
        record: The same for the last finished optimizer step, over all ranks; None before the first.
        loss_coefs: Nonzero weights of the auxiliary losses, by name.
        loss_names: Their names in the order of the record.
        e_score_correction_bias: The balancing bias, (E,), float32; only where there is a `bias_update_rate`.
        bias_updates: How often the bias has moved, int64; only where there is a `bias_update_schedule`.
        bias_update_rate: Step size of the balancing bias; 0 for routers that have none.
        bias_update_schedule: How the step size changes (`litgpt_moe_ext.moe.balancing.bias.scheduled_rate`).
        own_kernels: Whether the package's own kernels may be used; otherwise only torch's operators.
        step_shares: Each expert's share of the global batch, for a load-balancing loss over it; None without one.
    """

    weight: Tensor | None
    e_score_correction_bias: Tensor
    bias_updates: Tensor
    bias_update_rate: float = 0.0
    bias_update_schedule: dict[str, int] | None = None

    def __init__(self, config: "Config") -> None:
        super().__init__()
        self.register_parameter("weight", None)
        self.n_expert = config.n_expert
        self.top_k = config.n_expert_per_token
        self.scaling_factor = config.routed_scaling_factor
        self.loss_coefs = {name: coef for name in LOSSES if (coef := getattr(config, loss_field(name)))}
        self.loss_names = tuple(self.loss_coefs)
        # Loaded here, where no compiler traces.
        self._loss_functions = {name: load(LOSSES[name].function) for name in self.loss_names}
        self.step_shares: StepShares | None = None
        if _STEP_LOSS in self.loss_coefs and config.router_load_balancing_loss_scope == "global_batch":
            self.step_shares = StepShares()
        self.tally = Tally(self.n_expert + len(SUMS) + len(self.loss_names))
        self.record: Tensor | None = None
        # `expert_backend: loop` asks for torch's operators only.
        self.own_kernels = config.expert_backend != "loop"
        self._foreign_losses = {name for name, loss in self._loss_functions.items() if loss.__module__ != _LOSSES}
        # The kernels know only the package's own losses.
        self._fusible = (
            self.own_kernels
            and set(self.loss_names) <= {*_FUSED_LOSSES, _WEIGHT_LOSS}
            and not self._foreign_losses
            and type(self).auxiliary_loss is Router.auxiliary_loss
            and self.n_expert <= fused_router.MOST_EXPERTS
        )
        # The choices of routers from other packages are checked: with wrong shapes, kernels would read out of bounds.
        self._is_ours = type(self).__module__.startswith("litgpt_moe_ext.")
        watch(self)

    def reset_parameters(self) -> None:
        """Initialise the weights; a router that does not learn has none."""

    def forward(
        self, x_TD: Tensor, n_sequence: int = 1, real_T: Tensor | None = None, ids: TokenIds | None = None
    ) -> Routing:
        """Choose K experts for each token.

        Args:
            x_TD: Tokens, any floating dtype.
            n_sequence: Number of sequences, of equal length, that the tokens are from.
            real_T: Which tokens are not padding, bool; None if all.
            ids: The token ids, for a router that needs them; passed on to `choose` and `given`.
        """
        tokens = _tokens(x_TD, ids)
        if self._fusible and fused_router.works_on(x_TD) and (rule := self.rule()) is not None:
            return self._decide(tokens, rule, n_sequence, real_T)
        choice = self.choose(*tokens)
        if not self._is_ours:
            self._check(choice, x_TD)
        if real_T is not None:
            choice = choice.route_nowhere(~real_T, self.n_expert)
        weights_TK, experts_TK = choice.weights_TK, choice.experts_TK
        trains = self._trains_on(x_TD) and not x_TD.is_meta
        auxiliary = {}
        for name, coef in self.loss_coefs.items() if trains else ():
            if name != _STEP_LOSS or self.step_shares is None:
                auxiliary[name] = coef * self.auxiliary_loss(name, choice, n_sequence, real_T)
        if auxiliary:
            weights_TK = inject(weights_TK, functools.reduce(torch.add, auxiliary.values()))
        if self.scaling_factor != 1.0:
            weights_TK = weights_TK * self.scaling_factor
        counts_E = tokens_per_expert(experts_TK, self.n_expert, real_T)
        if self.step_shares is not None and self.training and not x_TD.is_meta:
            counts_E = self.step_shares.count(counts_E)
        if trains:
            losses = [auxiliary.get(name) for name in self.loss_names]
            weights_TK = self._count_in_backward(weights_TK, choice, Counted(counts_E, real_T, losses))
        return Routing(weights_TK, experts_TK, counts_E, real_T)

    def _check(self, choice: Any, x_TD: Tensor) -> None:
        """Raise if a choice is malformed. The indices are not read, because that would wait for the GPU."""
        where = f"{type(self).__name__}.choose"
        if not isinstance(choice, Choice):
            raise TypeError(f"{where} returns a {type(choice).__name__}; it must return a Choice")
        chosen, all_scores = (x_TD.size(0), self.top_k), (x_TD.size(0), self.n_expert)
        for name, values in choice._asdict().items():
            shape, letters = (chosen, "(T, K)") if name.endswith("_TK") else (all_scores, "(T, E)")
            if values is not None and tuple(values.shape) != shape:
                raise ValueError(f"{where} returns {name} of shape {tuple(values.shape)}; {letters} is {shape}")
        if choice.experts_TK.dtype != torch.int64 or not choice.weights_TK.is_floating_point():
            raise ValueError(
                f"{where} returns experts_TK of {choice.experts_TK.dtype} and weights_TK of {choice.weights_TK.dtype}; "
                "they must be torch.int64 and a floating type"
            )

    def _trains_on(self, x_TD: Tensor) -> bool:
        # An empty batch has no losses (they are means) and adds nothing to a tally.
        return self.training and torch.is_grad_enabled() and x_TD.size(0) > 0

    def _decide(self, tokens: tuple[Any, ...], rule: Rule, n_sequence: int, real_T: Tensor | None) -> Routing:
        (given, passed), leaf_N = self.given(*tokens), None
        x_TD, given = tokens[0], given._replace(real_T=real_T)
        rule = rule._replace(scale=self.scaling_factor)
        if self._trains_on(x_TD):
            leaf_N = self.tally.leaf_on(x_TD.device)
            losses = {field: self.loss_coefs.get(name, 0.0) for name, field in _FUSED_LOSSES.items()}
            rule = rule._replace(**losses, global_batch=self.step_shares is not None)
            if rule.sequence:
                rule = rule._replace(sequences=n_sequence)
            if self.weight is not None and (coef := self.loss_coefs.get(_WEIGHT_LOSS)):
                given = given._replace(other_loss=weighted_orthogonality(Directions(self.weight, coef)))
        decision = fused_router.decide(given, rule, leaf_N, self.step_shares)
        if self.step_shares is not None and self.training:
            self.step_shares.count(decision.counts_E)
        return Routing(decision.weights_TK, decision.experts_TK, decision.counts_E, real_T, decision, passed)

    def rule(self) -> Rule | None:
        """Return the rule of `choose` for the fused kernels, or None if they do not implement it."""
        return None

    def given(self, x_TD: Tensor) -> tuple[Given, Passed | None]:
        """Return the inputs of the fused kernels, and `Routing.passed`."""
        raise NotImplementedError(f"{type(self).__name__} has a rule and must return its inputs from `given`")

    def choose(self, x_TD: Tensor) -> Choice:
        """Choose experts for each token."""
        raise NotImplementedError(f"{type(self).__name__} must say how it chooses experts")

    def scores(self, x_TD: Tensor, ids: TokenIds | None = None) -> Tensor | None:
        """Return the scores of all experts, (T, E), with rows that sum to 1; None for a router without scores."""
        choice = self.choose(*_tokens(x_TD, ids))
        return None if choice.logits_TE is None else choice.probabilities()

    def auxiliary_loss(self, name: str, choice: Choice, n_sequence: int, real_T: Tensor | None = None) -> Tensor:
        """Return the auxiliary loss `name` without its weight, a scalar; 0 for padding alone.

        Args:
            name: A name in `litgpt_moe_ext.moe.registry.LOSSES`, which lists the inputs of the loss.
            choice: The decision for a batch.
            n_sequence: As in `forward`.
            real_T: As in `forward`.

        Raises:
            ValueError: If there is padding and the loss takes `n_sequence` but not `real_T`, or if a loss of an
                extension does not return a floating scalar.
        """
        loss = LOSSES[name]
        if real_T is not None and "real_T" not in loss.inputs:
            if "n_sequence" in loss.inputs:
                raise ValueError(f"{loss_field(name)}: a loss per sequence must have real_T among its inputs; add it")
            choice, real_T = choice.rows(real_T), None
            if not len(choice.weights_TK):
                return choice.weights_TK.new_zeros(())  # a mean over no tokens would be NaN

        def value_of(name: str) -> Any:
            if name == "probabilities_TE":
                return choice.probabilities()
            if name == "n_sequence":
                return n_sequence
            if name == "real_T":
                return real_T
            return getattr(choice if hasattr(choice, name) else self, name)

        value = self._loss_functions[name](*(value_of(name) for name in loss.inputs))
        if name in self._foreign_losses:
            _check_loss(name, value)
        return value

    @property
    def load_E(self) -> Tensor | None:  # noqa: N802
        """The tokens per expert of the last finished optimizer step over all ranks, or None before the first."""
        return None if self.record is None else self.record[: self.n_expert]

    def _count_in_backward(self, weights_TK: Tensor, choice: Choice, counted: Counted) -> Tensor:
        leaf_N, step_loss = self.tally.leaf_on(weights_TK.device), None
        if self.step_shares is not None:
            step_loss = StepLoss(self.step_shares, self.loss_coefs[_STEP_LOSS], self.loss_names.index(_STEP_LOSS))
        return count_in_backward(weights_TK, leaf_N, choice, counted, step_loss)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        super()._apply(fn, recurse)
        self.tally.follow(fn)
        return self

    def __setstate__(self, state: dict) -> None:
        # Copied and unpickled routers skip `__init__`, but must be balanced as well.
        super().__setstate__(state)
        watch(self)


def _tokens(x_TD: Tensor, ids: TokenIds | None) -> tuple[Any, ...]:
    # Routers that need no ids take none.
    return (x_TD,) if ids is None else (x_TD, ids)


def _check_loss(name: str, value: Any) -> None:
    if isinstance(value, Tensor) and not value.dim() and value.is_floating_point():
        return
    returned = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise ValueError(f"{loss_field(name)}: its loss returns {returned}; it must return a floating tensor of shape ()")
