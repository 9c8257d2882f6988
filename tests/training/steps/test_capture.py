"""A capture that is broken off leaves torch as it was, on a card that is not there."""

from types import SimpleNamespace

import pytest
import torch

from litgpt_moe_ext.training.steps.capture import CudaCapture


class Card:
    """What `torch.cuda` is during captures, of which one fails; as torch 2.11 does, a broken capture ends nothing."""

    def __init__(self, monkeypatch, fails_in):
        self.fails_in, self.stream, self.filling, self.users, self.generator = fails_in, "usual", [], [], "before"
        self.begun = 0
        card = self

        class Graph:
            def __init__(self, graph, pool, capture_error_mode):
                self.pool = pool

            def __enter__(self):
                card.begun += 1
                card.stream, card.generator = "capturing", "capturing"
                card.fail("begin")
                card.filling.append(self.pool)
                card.users.append(self.pool)

            def __exit__(self, kind, error, traceback):
                if kind is RuntimeError:
                    raise RuntimeError("operation failed due to a previous error during capture")
                card.fail("end")
                card.filling.remove(self.pool)
                card.users.remove(self.pool)  # its graph's end is not looked at here
                card.stream, card.generator = "usual", "before"

        def end_filling(device, pool):
            if pool not in card.filling:
                raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
            card.filling.remove(pool)

        def set_stream(stream):
            card.stream = stream.name

        generator = SimpleNamespace(
            clone_state=lambda: card.generator, graphsafe_set_state=lambda state: setattr(card, "generator", state)
        )
        functions = {
            "CUDAGraph": lambda: SimpleNamespace(replay=None), "graph": Graph, "graph_pool_handle": lambda: (0, 1),
            "default_generators": [generator], "set_stream": set_stream,
            "current_stream": lambda: SimpleNamespace(name=card.stream, device_index=0),
        }  # fmt: skip
        for name, function in functions.items():
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_filling, raising=False)
        release = lambda device, pool: card.users.remove(pool)  # noqa: E731
        monkeypatch.setattr(torch._C, "_cuda_releasePool", release, raising=False)

    def fail(self, where):
        if self.fails_in == (self.begun, where):
            raise RuntimeError(f"failed in the {where} of {self.begun}")


@pytest.mark.parametrize("where", ["begin", "pass", "python", "end"])
@pytest.mark.parametrize("graph", [1, 2], ids=["forward", "backward"])
def test_a_capture_that_fails_leaves_nothing(monkeypatch, graph, where):
    card, in_python = Card(monkeypatch, (graph, where)), where == "python"
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
        CudaCapture()(loss, torch.ones(3), torch.ones(3), add=False)
    assert str(caught.value) == ("'no such thing'" if in_python else f"failed in the {where} of {graph}")
    assert (card.stream, card.filling, card.users, card.generator) == ("usual", [], [], "before")
    assert weight.grad is kept
    assert kept.tolist() == [2.0, 2.0, 2.0]


def test_passes_that_do_not_add(monkeypatch):
    Card(monkeypatch, None)
    weight = torch.ones(3, requires_grad=True)
    weight.grad = kept = torch.full((3,), 2.0)
    passes = CudaCapture()(lambda ids, targets: (weight * ids).sum(), torch.ones(3), torch.ones(3), add=False)
    assert weight.grad is kept
    assert passes.gradients[weight] is not kept
    assert passes.gradients[weight].tolist() == [1.0, 1.0, 1.0]
