"""Run by `tests/test_triton.py`, in a process where Triton interprets: blocks are measured and found."""

from contextlib import nullcontext

import pytest
import torch

from litgpt_moe_ext.inspect import tuning
from litgpt_moe_ext.inspect.tuning import Pass, measure, products_of
from litgpt_moe_ext.moe.kernels.triton import rows, weights
from litgpt_moe_ext.moe.kernels.triton.tiling.tile_choice import rows_tile, tuned_as, weights_tile
from litgpt_moe_ext.moe.kernels.triton.tiling.tiles import RowsWork, WeightsWork
from litgpt_moe_ext.moe.kernels.triton.tiling.tuned_tiles import TunedTiles
from tests.models import moe_config

CPU = torch.device("cpu")
PRODUCTS = [
    pytest.param(RowsWork("ieee", 2, 8, 32, 16, 2, True, False, False), marks=pytest.mark.slow),
    pytest.param(RowsWork("ieee", 2, 8, 16, 32, 2, False, True, False), marks=pytest.mark.slow),
    pytest.param(RowsWork("ieee", 2, 8, 16, 16, 2, True, False, True), marks=pytest.mark.slow),
    pytest.param(RowsWork("half", 2, 8, 32, 32, 2, False, True, True), marks=pytest.mark.slow),
    pytest.param(WeightsWork("ieee", 2, 8, 32, 16, 2, False, True, False, True), marks=pytest.mark.slow),
    pytest.param(WeightsWork("half", 2, 8, 32, 16, 2, False, True, False, False), marks=pytest.mark.slow),
    WeightsWork("half", 2, 8, 16, 32, 2, True, False, True, True),
]


@pytest.fixture
def used(monkeypatch):
    """The blocks that were launched, in order."""
    blocks = []
    for module in (rows, weights):
        monkeypatch.setattr(module, "launch", _noting(module.launch, blocks))
    return blocks


def _noting(launch, blocks):
    def note(kernel, grid, arguments, *rest):
        blocks.append(arguments[-1])
        launch(kernel, grid, arguments, *rest)

    return note


@pytest.mark.parametrize("work", PRODUCTS, ids=str)
def test_the_fastest_block_is_found_and_used(work, used):
    """Although it is none of those that are tried first; what a product is measured with is that product."""
    written = set()

    def milliseconds(call):
        written.add(call().dtype)
        tile = used[-1]
        return 1.0 + abs(tile.rows - 64) + abs(tile.out - 64) + abs(tile.inner - 64) + 0.1 * (tile.stages != 2)

    found = measure(work, CPU, milliseconds)
    wide = work.precision != "half" or (isinstance(work, WeightsWork) and work.float32)
    assert written == {torch.float32 if wide else torch.bfloat16}
    assert found.best == found.best._replace(rows=64, out=64, inner=64, stages=2)
    assert found.best_us == 1000
    assert found.table_us > 1000
    assert found.tuned == found.best
    of_rows = isinstance(work, RowsWork)
    choice = rows_tile if of_rows else weights_tile
    with tuned_as(TunedTiles({work: found.best} if of_rows else {}, {} if of_rows else {work: found.best}), CPU):
        assert choice(work, CPU) == found.best
        assert choice(work._replace(n_row=10), CPU) != found.best
    assert choice(work, CPU) == found.table


@pytest.mark.slow
@pytest.mark.parametrize("work", [PRODUCTS[-1]], ids=str)
def test_a_little_faster_is_chance(work, used):
    def milliseconds(call):
        call()
        return 1.0 if used[-1].rows == 64 else 1.02

    found = measure(work, CPU, milliseconds)
    assert found.best == found.table
    assert found.tuned is None


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["does not fit", "computes something else"])
@pytest.mark.parametrize("work", [PRODUCTS[0], PRODUCTS[-1]], ids=str)
def test_a_faulty_block_is_never_the_fastest(work, fault, used, monkeypatch):
    name = "multiply_rows" if isinstance(work, RowsWork) else "sum_outer_products"
    original = getattr(tuning, name)

    def faulty(*arguments):
        result = original(*arguments)
        if used[-1].rows == 64:
            if fault == "does not fit":
                raise RuntimeError("out of resource: shared memory")
            result[-1, -1] += 0.1 * result.abs().max()
        return result

    monkeypatch.setattr(tuning, name, faulty)

    def milliseconds(call):
        call()
        return float(abs(used[-1].rows - 64) + 1)

    found = measure(work, CPU, milliseconds)
    assert found.best.rows != 64
    assert found.best_us < float("inf")


@pytest.mark.parametrize("add", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_products_are_those_of_a_training_pass(add):
    sizes = {"n_embd": 32, "moe_intermediate_size": 16, "n_expert": 4, "n_expert_per_token": 2}
    config = moe_config(**sizes, n_layer=3, vocab_size=64, expert_backend="triton")
    found = products_of(config, Pass((2, 12), torch.float32, nullcontext(), add), CPU)
    width = 2 * config.moe_intermediate_size
    of_rows = {(work.n_in, work.n_out, work.transposed) for work in found if isinstance(work, RowsWork)}
    assert of_rows == {(32, width, False), (16, 32, False), (32, 16, True), (width, 32, True)}
    gradients = [work for work in found if isinstance(work, WeightsWork)]
    assert {(work.n_out, work.n_in) for work in gradients} == {(width, 32), (32, 16)}
    assert sum(work.add for work in gradients) == 2 * add
    assert len(found) == 6 + 2 * add
    assert {(work.n_expert, work.n_row, work.top_k) for work in found} == {(4, 48, 2)}
