"""Block sizes of the Triton kernels, for each kind of NVIDIA card and each kind of number.

Tables instead of autotuning in every run, because another block size means another order of additions, and two runs
should give the same bits. `litgpt-moe tune` measures once, and what it found takes precedence (`tile_choice`).

Every entry must fit into the shared memory of its cards without spilling registers; the tests compile all of them.
Hopper's `some`, `many`, `weights` and `few_weights` for 16-bit numbers are among the fastest of a dozen on an H200; no
other entry was timed on a card. TF32 on Hopper and on Blackwell for data centres may have faster ones: their Tensor
Cores want the numbers of a sum side by side, so the operands of backward passes are copied one by one.

A large block reads its operands less often, but a small product then has fewer blocks than a card has multiprocessors.
On the H200, small blocks win below 50 to 75 % as many blocks as multiprocessors for products of rows, and below 145 to
195 % for gradients, two of whose blocks share a multiprocessor.
"""

import functools
from typing import Literal, NamedTuple

import torch

from litgpt_moe_ext.kernels.launch import ceil_div
from litgpt_moe_ext.kernels.precision import float32_precision

Precision = Literal["half", "tf32", "ieee"]


class Tile(NamedTuple):
    """The block of one Triton program.

    Attributes:
        rows: Routed rows.
        out: Columns of the result.
        inner: Columns of the operand that is read along them.
        warps: Warps of 32 threads that share the block.
        stages: How many loads are under way at once.
    """

    rows: int
    out: int
    inner: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.out}x{self.inner} w{self.warps} s{self.stages}"


class RowsWork(NamedTuple):
    """A product of routed rows, as far as its block depends on it.

    Attributes:
        precision: How numbers are multiplied.
        n_expert: Number of experts.
        n_row: Routed rows.
        n_out: Outputs of the weights.
        n_in: Inputs of the weights.
        top_k: Chosen experts per token.
        gather: Whether tokens are read, not rows in the order of experts.
        scatter: Whether rows are written in the order of tokens.
        transposed: Whether the weights' outputs, not their inputs, lie side by side in memory.
    """

    precision: Precision
    n_expert: int
    n_row: int
    n_out: int
    n_in: int
    top_k: int
    gather: bool
    scatter: bool
    transposed: bool

    def __str__(self) -> str:
        of = "tokens" if self.gather else "rows"
        return f"{self.n_row} {of} of {self.n_in} to {self.n_out}{', backward' if self.transposed else ''}"


class WeightsWork(NamedTuple):
    """A gradient of experts' weights, as far as its block depends on it.

    Attributes:
        precision: How numbers are multiplied.
        n_expert: Number of experts.
        n_row: Routed rows.
        n_out: Outputs of the weights.
        n_in: Inputs of the weights.
        top_k: Chosen experts per token.
        gather_left: Whether the left operand is one of tokens.
        gather_right: Whether the right one is.
        add: Whether it is added to another gradient.
        float32: Whether it is written in float32, whatever its operands are.
    """

    precision: Precision
    n_expert: int
    n_row: int
    n_out: int
    n_in: int
    top_k: int
    gather_left: bool
    gather_right: bool
    add: bool
    float32: bool

    def __str__(self) -> str:
        return f"gradient of {self.n_out} x {self.n_in}, {self.n_row} rows{', added' if self.add else ''}"


class Tiles(NamedTuple):
    """The blocks of one kind of card for one kind of number.

    Attributes:
        few: For experts with about 16 rows each.
        some: For experts with about 64 rows each, and small products.
        many: For experts with more.
        weights: For the gradient of weights; `rows` is what one step of the sum reads.
        few_weights: The same where there are few weights.
        added_weights: The same where it is added to another gradient. A thread then holds twice as many numbers, and
            too many of them halve the blocks of a multiprocessor (on an H200 2,048 tokens of 64 narrow experts took
            100 us instead of 80).
        odd: For widths that are not multiples of 16, which are read element by element and need many registers.
        odd_weights: The same for the gradient of weights.
    """

    few: Tile
    some: Tile
    many: Tile
    weights: Tile
    few_weights: Tile
    added_weights: Tile
    odd: Tile
    odd_weights: Tile

    def for_rows(self, work: RowsWork, processors: int) -> Tile:
        """Return the block of a product of rows on a card with so many multiprocessors."""
        if work.n_out % 16 or work.n_in % 16:
            return self.odd
        mean_rows = work.n_row // work.n_expert
        if mean_rows <= 24:
            return self.few
        # On average, the last block of an expert is half empty.
        blocks = (work.n_row / self.many.rows + work.n_expert / 2) * ceil_div(work.n_out, self.many.out)
        small = work.n_out < self.many.out or blocks < 0.65 * processors
        return self.some if small or mean_rows <= 96 else self.many

    def for_weights(self, work: WeightsWork, processors: int) -> Tile:
        """Return the block of a gradient of weights on a card with so many multiprocessors."""
        if work.n_out % 16 or work.n_in % 16:
            return self.odd_weights
        blocks = work.n_expert * ceil_div(work.n_out, self.weights.out) * ceil_div(work.n_in, self.weights.inner)
        if blocks < 1.5 * processors:
            return self.few_weights
        return self.added_weights if work.add else self.weights


class Card(NamedTuple):
    """A kind of card.

    Attributes:
        name: NVIDIA's name of the architecture.
        shared_kib: Shared memory that one block of threads may use, KiB.
        tiles: Blocks by kind of number; a kind without an entry is not computed.
    """

    name: str
    shared_kib: int
    tiles: dict[Precision, Tiles]


_Block = tuple[int, int, int, int, int]
_ODD = ((32, 64, 32, 4, 2), (32, 64, 64, 4, 2))


def _tiles(
    rows: tuple[_Block, _Block, _Block],
    weights: _Block,
    few: _Block | None = None,
    added: _Block | None = None,
    odd: tuple[_Block, _Block] = _ODD,
) -> Tiles:
    # Blocks in the order of `Tiles`, each with the fields of `Tile`; `few` and `added` default to the block of
    # `weights`.
    return Tiles(*(Tile(*block) for block in (*rows, weights, few or weights, added or weights, *odd)))


# Products on the ordinary cores: registers are the limit, so small blocks for all.
_IEEE = _tiles(
    ((16, 64, 32, 4, 2), (64, 64, 16, 4, 2), (64, 64, 16, 4, 2)), (16, 64, 64, 4, 2),
    odd=((32, 64, 16, 4, 2), (16, 64, 32, 4, 2)),
)  # fmt: skip

_TURING = Card(
    "Turing",
    64,
    {
        # Triton has dropped Turing's Tensor Cores (triton-lang/triton#5066): products are multiply-adds of the ordinary
        # cores in every block size. torch's `bmm` over padded groups would use them, but does E / K times the work
        # unless it waits for the number of rows of each expert; the loop uses them, and waits.
        "half": _tiles(
            ((16, 32, 32, 4, 2), (32, 64, 16, 4, 2), (64, 64, 16, 4, 2)), (16, 64, 64, 4, 2),
            odd=((32, 32, 16, 4, 2), (16, 32, 64, 4, 2)),
        ),
        "ieee": _IEEE,
    },
)  # fmt: skip
_AMPERE = Card(
    "Ampere (A100)",
    163,
    {
        "half": _tiles(
            ((16, 128, 64, 4, 4), (64, 128, 64, 4, 3), (128, 128, 32, 4, 4)), (32, 128, 128, 4, 4),
            few=(64, 64, 64, 4, 4), added=(32, 128, 128, 8, 4),
        ),
        "tf32": _tiles(
            ((16, 64, 64, 4, 3), (64, 64, 32, 4, 3), (128, 128, 32, 8, 3)), (32, 128, 128, 8, 3),
            few=(32, 64, 64, 4, 4),
        ),
        "ieee": _IEEE,
    },
)  # fmt: skip
_GEFORCE = Card(
    "Ampere, Ada or Blackwell for desktops",
    99,
    {
        "half": _tiles(
            ((16, 128, 64, 4, 3), (64, 128, 32, 4, 4), (128, 128, 32, 4, 3)), (32, 128, 128, 4, 3),
            few=(64, 64, 64, 4, 3), added=(32, 128, 128, 8, 3),
        ),
        "tf32": _tiles(
            ((16, 64, 64, 4, 3), (64, 64, 32, 4, 3), (128, 64, 32, 4, 3)), (32, 128, 64, 4, 3),
            few=(32, 64, 64, 4, 3),
        ),
        "ieee": _IEEE,
    },
)  # fmt: skip
_HOPPER = Card(
    "Hopper",
    227,
    {
        "half": _tiles(
            ((16, 128, 64, 4, 4), (64, 128, 64, 4, 4), (128, 256, 64, 8, 3)), (64, 128, 128, 8, 3),
            few=(128, 64, 64, 4, 3), added=(128, 64, 64, 4, 3),
        ),
        "tf32": _tiles(
            ((16, 64, 64, 4, 3), (64, 128, 32, 4, 3), (128, 128, 32, 8, 4)), (32, 128, 128, 8, 4),
            few=(64, 64, 64, 4, 3),
        ),
        "ieee": _IEEE,
    },
)  # fmt: skip
_BLACKWELL = Card(
    "Blackwell for data centres",
    227,
    {
        "half": _tiles(
            ((16, 128, 64, 4, 4), (64, 128, 64, 4, 4), (128, 128, 64, 4, 4)), (64, 128, 128, 8, 4),
            few=(128, 64, 64, 4, 3),
        ),
        "tf32": _HOPPER.tiles["tf32"],
        "ieee": _IEEE,
    },
)  # fmt: skip
# For unknown cards (AMD), blocks that fit everywhere; on a CPU, blocks so small that small tests have several.
_SMALL = _tiles(
    ((16, 64, 32, 4, 2), (64, 64, 32, 4, 2), (64, 64, 32, 4, 2)), (32, 64, 64, 4, 2), few=(32, 64, 32, 4, 2)
)
_OTHER = Card("another vendor's", 64, {"half": _SMALL, "ieee": _IEEE})
_TINY = _tiles(
    ((16, 32, 16, 4, 1), (16, 32, 32, 4, 1), (32, 32, 32, 4, 1)), (16, 32, 16, 4, 1),
    few=(32, 16, 16, 4, 1), added=(16, 16, 32, 4, 1), odd=((32, 32, 32, 4, 1), (32, 32, 32, 4, 1)),
)  # fmt: skip
_INTERPRETER = Card("interpreter", 64, {"half": _TINY, "tf32": _TINY, "ieee": _TINY})

# By compute capability. One that is not listed takes the nearest entry below.
CARDS: dict[tuple[int, int], Card] = {
    (7, 5): _TURING,
    (8, 0): _AMPERE,
    (8, 6): _GEFORCE,
    (8, 7): _AMPERE,
    (8, 9): _GEFORCE,
    (9, 0): _HOPPER,
    (10, 0): _BLACKWELL,
    (12, 0): _GEFORCE,
}


@functools.cache
def card_for(capability: tuple[int, int] | None) -> Card:
    """Return the kind of card with this compute capability; the interpreter for None."""
    if capability is None:
        return _INTERPRETER
    if torch.version.hip is not None:
        return _OTHER
    return CARDS[max(known for known in CARDS if known <= max(capability, (7, 5)))]


def precision_of(dtype: torch.dtype, capability: tuple[int, int] | None) -> Precision:
    """Return how numbers of `dtype` are multiplied; float32 follows the user's setting for matrix products."""
    if dtype != torch.float32:
        return "half"
    # Only some of AMD's chips have TF32, and Triton refuses it for the others.
    has_tf32 = capability is None or (capability >= (8, 0) and torch.version.hip is None)
    return "tf32" if has_tf32 and float32_precision("cuda") != "ieee" else "ieee"
