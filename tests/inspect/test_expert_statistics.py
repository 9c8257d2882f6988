"""Statistics of routings made by hand, whose answers are known."""

import math

import pytest
import torch

from litgpt_moe_ext.inspect.experts import statistics
from litgpt_moe_ext.inspect.experts.analysis import _warning
from litgpt_moe_ext.inspect.experts.capture import LayerRouting
from litgpt_moe_ext.inspect.experts.report import _token
from litgpt_moe_ext.inspect.figures import agreement_figure, balance_figure


def test_load_mass_and_pairs():
    experts = torch.tensor([[0, 1], [0, 2], [1, 0]])
    weights = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.25, 0.75]])
    assert statistics.expert_load(experts, 4).tolist() == [3, 2, 1, 0]
    assert statistics.gate_mass(weights, experts, 4).tolist() == pytest.approx([2.15 / 3, 0.75 / 3, 0.1 / 3, 0])
    pairs = statistics.coactivation(experts, 4)
    assert pairs.tolist() == [[3, 2, 1, 0], [2, 2, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]


def test_a_text_is_long_enough_by_the_visits_of_an_expert():
    """Of 8 experts that 2 of each token's visits go to, each has a quarter of the tokens: 100 of 400."""
    layer = LayerRouting(0, 8, torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.int64), None)
    assert _warning(400, layer) is None
    assert "399 tokens an expert has about 100 visits" in _warning(399, layer)
    assert "read at least 400 tokens" in _warning(399, layer)


def test_even_pairs_have_lift_one():
    experts = torch.combinations(torch.arange(4), 2)
    pairs = statistics.coactivation(experts, 5)
    lift = statistics.coactivation_lift(pairs, least=1)  # as many as are expected
    off_diagonal = ~torch.eye(4, dtype=torch.bool)
    assert torch.allclose(lift[:4, :4][off_diagonal], torch.ones(12, dtype=torch.float64))
    assert lift.diagonal().isnan().all()
    assert lift[4].isnan().all(), "an expert without tokens has no expectation"


def test_pairs_that_always_go_together():
    lift = statistics.coactivation_lift(statistics.coactivation(torch.tensor([[0, 1]] * 5 + [[2, 3]] * 5), 4))
    # Of the six pairs two are ever seen, each three times as often as if pairs were even.
    assert lift[0, 1].item() == lift[2, 3].item() == pytest.approx(3)
    assert lift[0, 2].item() == 0


def test_pairs_that_are_drawn_by_uneven_loads_alone_have_lift_one():
    weights = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0])
    pairs = torch.outer(weights, weights).fill_diagonal_(0)
    lift = statistics.coactivation_lift(pairs + torch.diag(pairs.sum(dim=1)))
    assert lift[~torch.eye(5, dtype=torch.bool)].tolist() == pytest.approx([1.0] * 20)


def test_an_expert_that_all_tokens_visit_pairs_with_none_in_particular():
    chosen = torch.tensor([[0, 1], [0, 2], [0, 3]] * 100)
    lift = statistics.coactivation_lift(statistics.coactivation(chosen, 4), least=1)
    assert lift[0, 1:].tolist() == pytest.approx([1.0] * 3, abs=0.01)
    assert lift[1:, 1:].isnan().all(), "no pair of these is expected"


def test_specialists_and_generalists():
    classes = torch.tensor([0, 0, 1, 1])
    specialists = statistics.class_counts(classes, torch.tensor([[0], [0], [1], [1]]), 2, 2)
    generalists = statistics.class_counts(classes, torch.tensor([[0], [1], [0], [1]]), 2, 2)
    assert specialists.tolist() == [[2, 0], [0, 2]]
    assert statistics.normalized_information(specialists) == pytest.approx(1)
    assert statistics.normalized_information(generalists) == pytest.approx(0, abs=1e-12)
    assert math.isnan(statistics.normalized_information(torch.tensor([[3, 4]])))
    assert statistics.lift(specialists).tolist() == [[2, 0], [0, 2]]
    assert statistics.lift(generalists).tolist() == [[1, 1], [1, 1]]
    assert statistics.lift(generalists, generalists.sum().item() / 4).tolist() == [[1, 1], [1, 1]], "just enough"


def test_specific_tokens():
    # Token 7 always visits expert 1, token 5 visits both alike, token 9 once.
    ids = torch.tensor([7] * 10 + [5] * 20 + [9])
    experts = torch.tensor([[1]] * 10 + [[0], [1]] * 10 + [[0]])
    found = statistics.specific_tokens(ids, experts, 2, best=3)
    assert found[1][0].id == 7
    assert (found[1][0].count, found[1][0].share) == (10, 1.0)
    assert [token.id for token in found[0]] == [5, 9]
    # Dunning's G^2 of the table (10, 0; 10, 11).
    table = [(10, 10, 20), (10, 21, 20), (11, 21, 11)]
    expected = 2 * sum(cell * math.log(cell * 31 / (row * column)) for cell, row, column in table)
    assert found[1][0].score == pytest.approx(expected)


def test_specific_tokens_are_counted_once_however_many_experts_they_visit():
    found = statistics.specific_tokens(torch.tensor([7, 7, 5, 5]), torch.tensor([[0, 1], [0, 1], [0, 2], [1, 2]]), 3, 1)
    table = [(2, 2, 3), (1, 2, 3), (1, 2, 1)]
    expected = 2 * sum(cell * math.log(cell * 4 / (row * column)) for cell, row, column in table)
    assert (found[1][0].id, found[1][0].score) == (7, pytest.approx(expected))


def test_agreement_up_to_names():
    first = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 1]])
    renamed = torch.tensor([2, 0, 1])[first]
    found = statistics.agreement(first, renamed, 3)
    assert found.matching == [2, 0, 1]
    assert found.matched == 1
    assert found.chance == (3 * 3 + 3 * 3 + 2 * 2) / 4 / 8, "by the loads of those that go together"
    assert found.same < 1
    assert statistics.agreement(first, first, 3).same == 1


def test_agreement_of_strangers_is_chance():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.rand(20000, 8, generator=generator).topk(2).indices for _ in range(2))
    found = statistics.agreement(first, second, 8)
    assert found.chance == pytest.approx(2 / 8, abs=0.01)
    assert found.matched == pytest.approx(found.chance, abs=0.02)


def test_a_tooltip_counts_the_occurrences_of_its_token():
    shown = _token({"text": "a b", "count": 5, "share": 0.5})
    assert shown == '<code title="5 of 10 occurrences (50%)">a·b</code>'


def test_a_single_expert_has_a_picture():
    layer = {"layer": 0, "n_expert": 1, "max_vio": 0.0, "load_entropy": 1.0, "class_information": None}
    figure = balance_figure([{**layer, "router_entropy": 0.0, "router_entropy_of_even": 0.0}])
    assert [len(axes.lines) for axes in figure.axes] == [1, 1, 1, 1]


def test_the_highest_value_is_seen_below_the_frame():
    """Also of values that are nearly alike."""
    entropies = {"load_entropy": 1.0, "router_entropy": 0.5, "router_entropy_of_even": 1.0}
    layers = [
        {"layer": i, "n_expert": 2, "max_vio": v, "class_information": v, **entropies} for i, v in ((0, 9), (1, 8.9))
    ]
    for axes in balance_figure(layers).axes:
        bottom, top = axes.get_ylim()
        assert bottom == 0
        assert max(axes.lines[0].get_ydata()) <= 0.96 * top


def test_full_agreement_is_seen_below_the_frame():
    entry = {"layer": 0, "matching": [0, 1], "overlap_EE": [[1, 0], [0, 1]], "matched": 1.0, "same": 1.0, "chance": 0.5}
    first = agreement_figure([entry], ("a", "b")).axes[0]
    assert max(max(line.get_ydata()) for line in first.lines) < first.get_ylim()[1]
