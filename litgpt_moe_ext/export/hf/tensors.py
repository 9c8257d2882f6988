"""The map between names and shapes of weights, written once and read in both directions.

A rule says which tensor of a LitGPT state dictionary is which tensors of a Hugging Face checkpoint: one tensor is the
concatenation of several along a dimension, or a stack of one per expert, and a part may be stored in another
layout. Going out cuts, going in joins.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Layout:
    """How a part is stored there, and how it becomes ours again."""

    out: Change
    back: Change


def _same(tensor: Tensor) -> Tensor:
    return tensor


AS_IT_IS = Layout(_same, _same)
# GPT-2 stores linear maps as (in, out).
TRANSPOSED = Layout(lambda w: w.T, lambda w: w.T)


def interleaved(head_size: int, rotated: int | None = None) -> Layout:
    """Return the layout of query and key rows for classes that rotate neighbours instead of halves.

    Args:
        head_size: Rows of a head.
        rotated: How many of them are rotated, the last ones; by default all.
    """
    rotated = rotated or head_size

    def moved(rows: Tensor, shape: tuple[int, int]) -> Tensor:
        heads = rows.unflatten(0, (-1, head_size))
        kept, turned = heads.split((head_size - rotated, rotated), 1)
        turned = turned.unflatten(1, shape).transpose(1, 2).flatten(1, 2)
        return torch.cat([kept, turned], 1).flatten(0, 1)

    return Layout(lambda rows: moved(rows, (2, rotated // 2)), lambda rows: moved(rows, (rotated // 2, 2)))


@dataclass(frozen=True)
class Rule:
    """One tensor of ours and what it is there.

    Attributes:
        ours: Name in a LitGPT state dictionary.
        theirs: Names there, in the order of the concatenation. With `{e}` in them there is a set per expert.
        sizes: Rows of each part; None for equal parts.
        layouts: How parts are stored there, by name; the others as they are.
        dim: The dimension of the concatenation.
        whole: The form of our tensor in which it is a concatenation.
    """

    ours: str
    theirs: tuple[str, ...]
    sizes: tuple[int, ...] | None = None
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    dim: int = 0
    whole: Layout = AS_IT_IS

    @property
    def per_expert(self) -> bool:
        """Whether there is a set of tensors per expert."""
        return "{e}" in self.theirs[0]

    def out(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield names and tensors there, as views where the layout allows."""
        if self.per_expert:
            for e, expert in enumerate(tensor.unbind()):
                for name, part in self._cut(expert):
                    yield name.replace("{e}", str(e)), part
        else:
            yield from self._cut(tensor)

    def _cut(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        tensor = self.whole.out(tensor)
        cut = tensor.chunk(len(self.theirs), self.dim) if self.sizes is None else tensor.split(self.sizes, self.dim)
        for name, part in zip(self.theirs, cut, strict=True):
            yield name, self.layouts.get(name, AS_IT_IS).out(part)

    def back(self, get: Callable[[str], Tensor], n_expert: int) -> Tensor:
        """Return our tensor.

        Args:
            get: Returns a tensor there by its name.
            n_expert: Number of experts.
        """
        if not self.per_expert:
            return self._join(get, "")
        first = self._join(get, "0")
        # One expert beside the stack, not all of them once more.
        stack = first.new_empty((n_expert, *first.shape))
        stack[0] = first
        for e in range(1, n_expert):
            stack[e] = self._join(get, str(e))
        return stack

    def _join(self, get: Callable[[str], Tensor], expert: str) -> Tensor:
        parts = [self.layouts.get(n, AS_IT_IS).back(get(n.replace("{e}", expert))) for n in self.theirs]
        return self.whole.back(parts[0] if len(parts) == 1 else torch.cat(parts, self.dim))


@dataclass(frozen=True)
class Constant:
    """A tensor that a class has and our model has not: always the same there."""

    name: str
    make: Callable[[], Tensor]
