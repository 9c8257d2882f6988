"""Measures which block sizes are the fastest for the experts' products of a recipe on this card.

The products are those that a forward and a backward pass of its layers ask for. Each is measured alone, with rows that
are spread unevenly over the experts.

Shape legend: B sequences, T tokens, D model width, K chosen experts per token, E experts, R = T * K routed rows, O and
I widths of output and input.
"""

import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from litgpt import GPT, Config
from torch import Tensor, nn
from triton.testing import do_bench_cudagraph

from litgpt_moe_ext.inspect.cost.layers import shorten
from litgpt_moe_ext.moe.kernels.plan import Outer, Plan, Product, plan_of, sort_rows
from litgpt_moe_ext.moe.kernels.triton import multiply_rows, sum_outer_products
from litgpt_moe_ext.moe.kernels.triton.common import capability_of
from litgpt_moe_ext.moe.kernels.triton.tiling.tile_choice import rows_tile, tuned_as, weights_tile
from litgpt_moe_ext.moe.kernels.triton.tiling.tiles import RowsWork, Tile, WeightsWork
from litgpt_moe_ext.moe.kernels.triton.tiling.tuned_tiles import TunedTiles

Work = RowsWork | WeightsWork
Bench = Callable[[Callable[[], Tensor]], float]

# What is not faster by this share may be chance.
_WORTHWHILE = 0.03
_ROWS_SHAPES = (
    (16, 64, 64), (16, 128, 64), (32, 64, 64), (64, 64, 32), (64, 64, 64), (64, 128, 32), (64, 128, 64),
    (128, 64, 32), (128, 64, 64), (128, 128, 32), (128, 128, 64), (128, 256, 64),
)  # fmt: skip
_WEIGHTS_SHAPES = (
    (16, 64, 64), (32, 64, 64), (32, 64, 128), (32, 128, 64), (32, 128, 128), (64, 64, 64), (64, 64, 128),
    (64, 128, 64), (64, 128, 128), (128, 64, 64),
)  # fmt: skip


def _in_a_graph(call: Callable[[], Tensor]) -> float:
    return cast(float, do_bench_cudagraph(call, return_mode="median"))


class Measured(NamedTuple):
    """The blocks of a product, and its times.

    Attributes:
        work: The product.
        table: The block of the tables.
        table_us: Its time, microseconds.
        best: The fastest block, that of the tables unless another is clearly faster.
        best_us: Its time, microseconds.
    """

    work: Work
    table: Tile
    table_us: float
    best: Tile
    best_us: float

    @property
    def tuned(self) -> Tile | None:
        """The fastest block if it is another than that of the tables."""
        return None if self.best == self.table else self.best


class Pass(NamedTuple):
    """How a micro-batch is computed.

    Attributes:
        batch: Sequences, and tokens of each.
        dtype: Dtype of the weights.
        autocast: The context of the forward pass.
        add: Whether gradients are also added to those of the micro-batch before.
    """

    batch: tuple[int, int]
    dtype: torch.dtype
    autocast: AbstractContextManager[Any]
    add: bool


def products_of(config: Config, how: Pass, device: torch.device) -> list[Work]:
    """Return the products in a training pass of a model's experts, without duplicates."""
    with device:
        model = GPT(shorten(config).config).to(how.dtype)
        ids_BT = torch.randint(config.vocab_size, how.batch)
    for module in model.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    model.set_submodule("lm_head", nn.Identity())
    noted = TunedTiles(_Noting(), _Noting())
    with tuned_as(noted, device):
        with how.autocast:
            y_BTD = model(ids_BT)
        y_BTD.sum().backward()
    weights = list(noted.weights)
    return [*noted.rows, *weights, *([work._replace(add=True) for work in weights] if how.add else [])]


def measure(work: Work, device: torch.device, milliseconds: Bench = _in_a_graph) -> Measured:
    """Measure a product.

    Args:
        work: The product.
        device: The card.
        milliseconds: Returns the time of a function.
    """
    product = _Product(work, device)

    def time(tile: Tile) -> float:
        with _having(tile, work, device):
            return 1e3 * milliseconds(product.call) if product.is_right() else float("inf")

    with tuned_as(TunedTiles({}, {}), device):
        table = rows_tile(work, device) if isinstance(work, RowsWork) else weights_tile(work, device)
    times = {tile: time(tile) for tile in dict.fromkeys((table, *_first_tried(work)))}
    for tile in sorted(times, key=lambda tile: times[tile])[:2]:
        for other in (*(tile._replace(stages=n) for n in (2, 4)), tile._replace(warps=12 - tile.warps)):
            if other not in times:
                times[other] = time(other)
    best = min(times, key=lambda tile: times[tile])
    # The fastest of many is fast by chance as well, so both are measured again, in turns.
    again = [(time(table), time(best)) for _ in range(3)]
    table_us, best_us = (statistics.median(column) for column in zip(*again, strict=True))
    if best_us > (1 - _WORTHWHILE) * table_us:
        best, best_us = table, table_us
    return Measured(work, table, table_us, best, best_us)


class _Noting(dict):
    """Has no block for any product, and keeps those that were asked for."""

    def get(self, work: Any, default: Any = None) -> Any:
        self[work] = None
        return default


def _first_tried(work: Work) -> list[Tile]:
    """Return a block of each shape, with warps for the numbers of the result that it holds."""
    if isinstance(work, RowsWork):
        return [Tile(r, o, i, 8 if r * o > 64 * 128 else 4, 3) for r, o, i in _ROWS_SHAPES]
    return [Tile(r, o, i, 8 if o * i > 64 * 128 else 4, 3) for r, o, i in _WEIGHTS_SHAPES]


def _having(tile: Tile, work: Work, device: torch.device) -> AbstractContextManager[None]:
    """Have a product computed with a block within the scope."""
    tuned = TunedTiles({work: tile}, {}) if isinstance(work, RowsWork) else TunedTiles({}, {work: tile})
    return tuned_as(tuned, device)


class _Product:
    """A product of random numbers, whose rows are spread unevenly over the experts.

    Args:
        work: The product.
        device: Where.

    Attributes:
        call: Computes it.
    """

    def __init__(self, work: Work, device: torch.device) -> None:
        dtype = torch.float32 if work.precision != "half" else half_on(device)
        n_token, K, E = work.n_row // work.top_k, work.top_k, work.n_expert
        make = partial(torch.randn, device=device, dtype=dtype)
        plan = _uneven(n_token, E, K, device)
        self.call: Callable[[], Tensor]
        self._total_EOI: Tensor | None = None
        if isinstance(work, RowsWork):
            out, inner = work.n_out, work.n_in
            weight_EOI = make(E, inner, out).transpose(1, 2) if work.transposed else make(E, out, inner)
            x = make(n_token if work.gather else work.n_row, inner)
            self.call = partial(multiply_rows, Product(x, weight_EOI, None, plan, work.gather, work.scatter))
        else:
            left = make(n_token if work.gather_left else work.n_row, work.n_out)
            right = make(n_token if work.gather_right else work.n_row, work.n_in)
            written = torch.float32 if work.float32 else dtype
            outer = Outer(left, right, plan, work.gather_left, work.gather_right)
            if work.add:
                self._total_EOI = torch.zeros(E, work.n_out, work.n_in, device=device, dtype=written)
            self.call = partial(sum_outer_products, outer, written, self._total_EOI)
        with tuned_as(TunedTiles({}, {}), device):
            self._expected = self._result()

    def is_right(self) -> bool:
        """Return whether the block of now fits, and computes what that of the tables does."""
        try:
            result = self._result()
        except Exception:  # Triton, LLVM and ptxas have errors of their own for what does not fit
            return False
        # Sums in another order round differently, in 16 bits by one part in 128 at most.
        return bool((result - self._expected).abs().max() <= self._expected.abs().max() / 64)

    def _result(self) -> Tensor:
        if self._total_EOI is not None:
            self._total_EOI.zero_()
        return self.call().float().clone()


def half_on(device: torch.device) -> torch.dtype:
    """Return the 16-bit type in which a recipe computes on a device unless told otherwise."""
    capability = capability_of(device)
    return torch.float16 if capability is not None and capability < (8, 0) else torch.bfloat16


def _uneven(T: int, E: int, K: int, device: torch.device) -> Plan:
    """Return a routing in which the fullest expert has about three times the tokens of the emptiest."""
    generator = torch.Generator().manual_seed(0)
    chances_E = torch.rand(E, generator=generator) + 0.5
    experts_TK = torch.multinomial(chances_E.expand(T, E), K, generator=generator).to(device)
    rows_R, ends_E = sort_rows(experts_TK, torch.bincount(experts_TK.flatten(), minlength=E))
    return plan_of(rows_R, ends_E, T)
