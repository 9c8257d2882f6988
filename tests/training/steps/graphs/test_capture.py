"""A capture that is broken off leaves torch as it was, on a card that is not there."""

import copy
from types import SimpleNamespace

import pytest
import torch

from litgpt_moe_ext.training.steps.graphs.capture import CudaCapture


class State:
    """The state of a random generator, which refuses to be used while it is part of a capture."""

    def __init__(self):
        self.is_captured = False


class Card:
    """What `torch.cuda` is during captures, of which one fails.

    Torch 2.11 ends nothing of a broken capture; torch 2.15 stops filling its memory, and gives it up in `reset`.
    """

    def __init__(self, monkeypatch, fails_in, torch_mends=False):
        self.fails_in, self.mends = fails_in, torch_mends
        self.stream, self.generator, self.filling, self.users = "usual", State(), [], []
        self.begun = 0
        card = self

        class Graph:
            def __init__(self):
                self.pool = self.replay = None

            def reset(self):
                if card.mends and self.pool is not None:
                    card.stop_filling(self.pool)
                    card.users.remove(self.pool)
                    self.pool = None

        class Capture:
            def __init__(self, graph, pool, capture_error_mode):
                self.graph, graph.pool = graph, pool

            def __enter__(self):
                card.begun += 1
                card.stream, card.generator.is_captured = "capturing", True
                card.filling.append(self.graph.pool)
                card.users.append(self.graph.pool)
                card.fail("begin")

            def __exit__(self, kind, error, traceback):
                broken = kind is RuntimeError or card.fails_in == (card.begun, "end")
                if not broken or card.mends:
                    card.stop_filling(self.graph.pool)
                if kind is RuntimeError:
                    raise RuntimeError("operation failed due to a previous error during capture")
                card.fail("end")
                card.stream, card.generator.is_captured = "usual", False
                if not card.mends:
                    card.users.remove(self.graph.pool)  # the end of its graph is not looked at here

        def end_filling(device, pool):
            if pool not in card.filling:
                raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
            card.stop_filling(pool)

        def release(device, pool):
            assert pool in card.users, "torch ends the process here"
            card.users.remove(pool)

        def set_stream(stream):
            card.stream = stream.name

        generator = SimpleNamespace(
            clone_state=lambda: copy.copy(card.generator),
            graphsafe_get_state=lambda: card.generator,
            graphsafe_set_state=lambda state: setattr(card, "generator", state),
        )
        functions = {
            "CUDAGraph": Graph, "graph": Capture, "graph_pool_handle": lambda: (0, 1), "set_stream": set_stream,
            "default_generators": [generator], "current_device": lambda: 0,
            "current_stream": lambda: SimpleNamespace(name=card.stream, device_index=0),
        }  # fmt: skip
        for name, function in functions.items():
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_filling, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", release, raising=False)

    def stop_filling(self, pool):
        if pool in self.filling:
            self.filling.remove(pool)

    def fail(self, where):
        if self.fails_in == (self.begun, where):
            raise RuntimeError(f"failed in the {where} of {self.begun}")


@pytest.mark.parametrize("torch_mends", [False, True], ids=["torch 2.11", "torch 2.15"])
@pytest.mark.parametrize("where", ["begin", "pass", "python", "end"])
@pytest.mark.parametrize("graph", [1, 2], ids=["forward", "backward"])
def test_a_capture_that_fails_leaves_nothing(monkeypatch, graph, where, torch_mends):
    card, in_python = Card(monkeypatch, (graph, where), torch_mends), where == "python"
    weight = torch.ones(3, requires_grad=True)
    weight.grad = kept = torch.full((3,), 2.0)

    def fail(grad=None):
        card.fail("pass")
        if card.fails_in == (card.begun, "python"):
            raise KeyError("no such thing")

    def loss(ids, targets):
        fail()
        value = (weight * ids).sum()
        value.register_hook(fail)
        return value

    with pytest.raises(KeyError if in_python else RuntimeError) as caught:
        CudaCapture().passes(loss, torch.ones(3), torch.ones(3), add=False)
    assert str(caught.value) == ("'no such thing'" if in_python else f"failed in the {where} of {graph}")
    assert (card.stream, card.filling, card.generator.is_captured) == ("usual", [], False)
    # The graph of a forward pass gives its part up when it is deleted.
    assert len(card.users) == int(torch_mends and graph == 2)
    assert weight.grad is kept
    assert kept.tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("torch_mends", [False, True], ids=["torch 2.11", "torch 2.15"])
@pytest.mark.parametrize("where", ["begin", "function", "end"])
def test_a_function_whose_capture_fails_leaves_nothing(monkeypatch, where, torch_mends):
    """As of a validation: the generator keeps its state, which graphs of passes draw from."""
    card = Card(monkeypatch, (1, where), torch_mends)
    state = card.generator
    with pytest.raises(RuntimeError, match=f"failed in the {where} of 1"):
        CudaCapture().function(lambda: card.fail("function"))
    assert (card.stream, card.filling, card.users) == ("usual", [], [])
    assert card.generator is state
    assert not state.is_captured


def test_passes_that_do_not_add(monkeypatch):
    Card(monkeypatch, None)
    weight = torch.ones(3, requires_grad=True)
    weight.grad = kept = torch.full((3,), 2.0)
    passes = CudaCapture().passes(lambda ids, targets: (weight * ids).sum(), torch.ones(3), torch.ones(3), add=False)
    assert weight.grad is kept
    assert passes.gradients[weight] is not kept
    assert passes.gradients[weight].tolist() == [1.0, 1.0, 1.0]
