"""Statistics of the experts from the routing of a text, as pure functions.

Shape legend: N tokens, K chosen experts per token, E experts, C classes of tokens, V different token ids.
"""

import math
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

# Of the iteration for the expected pairs: enough for six digits, or three where one expert is in nearly all of them.
_ROUNDS = 1000


def expert_load(experts_NK: Tensor, n_expert: int) -> Tensor:
    """Return the number of tokens that visit each expert, (E,), int64."""
    return torch.bincount(experts_NK.flatten(), minlength=n_expert)


def gate_mass(weights_NK: Tensor, experts_NK: Tensor, n_expert: int) -> Tensor:
    """Return each expert's share of the sum of all gate values, (E,), float64."""
    mass_E = torch.zeros(n_expert, dtype=torch.float64)
    mass_E.index_add_(0, experts_NK.flatten(), weights_NK.flatten().double())
    return mass_E / mass_E.sum()


def coactivation(experts_NK: Tensor, n_expert: int) -> Tensor:
    """Return how many tokens visit both experts of each pair, (E, E), int64; on the diagonal the load."""
    visits_NE = torch.zeros(len(experts_NK), n_expert, dtype=torch.float64).scatter_(1, experts_NK, 1.0)
    return (visits_NE.t() @ visits_NE).round().long()


def coactivation_lift(pairs_EE: Tensor, least: float = 0.0) -> Tensor:
    """Return each pair's visits relative to those expected from the loads alone, (E, E), float64.

    The expectation of a pair is the product of a factor for each of its experts, such that every expert is in as many
    pairs as it is (quasi-independence: no expert pairs with itself). The product of the loads would expect too few
    pairs of busy experts and too many of idle ones. The diagonal, and pairs with an expert without tokens, are nan.

    Args:
        pairs_EE: As from `coactivation`.
        least: Pairs with fewer expected visits are nan as well.
    """
    off_EE = ~torch.eye(len(pairs_EE), dtype=torch.bool)
    partners_E = pairs_EE.masked_fill(~off_EE, 0).sum(dim=1).double()
    factor_E = (partners_E / max(1, len(pairs_EE) - 1)).sqrt()  # the solution for even loads
    for _ in range(_ROUNDS):
        factor_E = (factor_E * partners_E / (factor_E.sum() - factor_E)).sqrt()
    expected_EE = torch.outer(factor_E, factor_E)
    lift_EE = pairs_EE / expected_EE
    return torch.where(off_EE & (expected_EE > 0) & (expected_EE >= least), lift_EE, math.nan)


def class_counts(classes_N: Tensor, experts_NK: Tensor, n_class: int, n_expert: int) -> Tensor:
    """Return how often tokens of each class visit each expert, (C, E), int64.

    Args:
        classes_N: Class of each token, int64.
        experts_NK: Chosen experts.
        n_class: Number of classes C.
        n_expert: Number of experts E.
    """
    cells_NK = classes_N.unsqueeze(1) * n_expert + experts_NK
    return torch.bincount(cells_NK.flatten(), minlength=n_class * n_expert).view(n_class, n_expert)


def lift(counts_CE: Tensor, least: float = 0.0) -> Tensor:
    """Return p(expert | class) / p(expert), (C, E), float64; nan where a class or an expert has no tokens.

    Args:
        counts_CE: As from `class_counts`.
        least: Cells with fewer expected visits are nan as well.
    """
    counts_CE = counts_CE.double()
    expected_CE = torch.outer(counts_CE.sum(dim=1), counts_CE.sum(dim=0)) / counts_CE.sum()
    return torch.where(expected_CE >= least, counts_CE / expected_CE, math.nan)


def normalized_information(counts_CE: Tensor) -> float:
    """Return the mutual information of class and expert over the entropy of the classes.

    0: the class of a token says nothing about its experts; 1: an expert tells the class. nan with a single class.
    """
    p_CE = counts_CE.double() / counts_CE.sum()
    p_C, p_E = p_CE.sum(dim=1), p_CE.sum(dim=0)
    entropy = torch.special.entr(p_C).sum()
    information = entropy + torch.special.entr(p_E).sum() - torch.special.entr(p_CE).sum()
    return (information / entropy).item() if entropy > 0 else math.nan


class SpecificToken(NamedTuple):
    """A token that visits an expert more often than others do.

    Attributes:
        id: Token id.
        count: How often it visits the expert.
        share: Fraction of its occurrences that visit the expert.
        score: Log-likelihood ratio G^2 of token and expert (Dunning 1993): how certain their association is.
    """

    id: int
    count: int
    share: float
    score: float


def specific_tokens(ids_N: Tensor, experts_NK: Tensor, n_expert: int, best: int) -> list[list[SpecificToken]]:
    """Return, for each expert, the tokens that are most surely over-represented, the surest first.

    Args:
        ids_N: Token ids.
        experts_NK: Chosen experts.
        n_expert: E.
        best: How many tokens per expert.
    """
    ids_V, index_N, total_V = ids_N.unique(return_inverse=True, return_counts=True)
    counts_VE = class_counts(index_N, experts_NK, len(ids_V), n_expert).double()
    visits_E, total = counts_VE.sum(dim=0), len(ids_N)
    score_VE = _log_likelihood_ratio(counts_VE, total_V.double().unsqueeze(1), visits_E, total)
    result = []
    for e in range(n_expert):
        order = score_VE[:, e].argsort(descending=True, stable=True)[:best].tolist()
        result.append(
            [
                SpecificToken(
                    int(ids_V[v]), int(counts_VE[v, e]), (counts_VE[v, e] / total_V[v]).item(), score_VE[v, e].item()
                )
                for v in order
                if score_VE[v, e] > 0
            ]
        )
    return result


def _log_likelihood_ratio(both: Tensor, first: Tensor, second: Tensor, total: int) -> Tensor:
    # Of the two-by-two table of "is this token" and "visits this expert"; negative where they avoid each other.
    expected = first * second / total
    table = [both, first - both, second - both, total - first - second + both]
    rows, columns = [first, first, total - first, total - first], [second, total - second] * 2
    sums = sum(
        torch.special.xlogy(cell, cell * total / (row * column).clamp(min=1e-300))
        for cell, row, column in zip(table, rows, columns, strict=True)
    )
    return torch.where(both > expected, 2 * sums, -2 * sums)


class Agreement(NamedTuple):
    """How far two routers agree about the same tokens.

    Attributes:
        same: Mean share of a token's K experts that are the same by number; for two checkpoints of one run.
        matched: The same after renumbering the second router's experts to agree best; for two runs.
        chance: Value of `matched` if both chose by their loads alone.
        matching: Number of the second router's expert that corresponds to each of the first's.
        overlap_EE: Tokens that visit expert i of the first and expert j of the second.
    """

    same: float
    matched: float
    chance: float
    matching: list[int]
    overlap_EE: Tensor


def agreement(first_NK: Tensor, second_NK: Tensor, n_expert: int) -> Agreement:
    """Compare the choices of two routers with the same number of experts, for the same tokens."""
    n, k = first_NK.shape
    visits = [torch.zeros(n, n_expert, dtype=torch.float64).scatter_(1, e, 1.0) for e in (first_NK, second_NK)]
    overlap_EE = visits[0].t() @ visits[1]
    rows, columns = linear_sum_assignment(overlap_EE.numpy(), maximize=True)
    load_E, other_E = visits[0].sum(dim=0), visits[1].sum(dim=0)
    return Agreement(
        same=overlap_EE.diagonal().sum().item() / (n * k),
        matched=overlap_EE[rows, columns].sum().item() / (n * k),
        chance=(load_E[rows] * other_E[columns]).sum().item() / n / (n * k),
        matching=columns.tolist(),
        overlap_EE=overlap_EE.round().long(),
    )
