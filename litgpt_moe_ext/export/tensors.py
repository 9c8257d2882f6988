"""The map between names and shapes of weights, written once and used in both directions.

"Ours" is this package's model, "there" the other library's. A table maps each of our tensors, by name, to tensors
there: several that it concatenates, or one per expert that it stacks, each possibly in another layout. Export cuts,
import joins.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from litgpt_moe_ext.config.types import Config

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Layout:
    """The conversions of a part to its stored form there and back."""

    out: Change
    back: Change


def _same(tensor: Tensor) -> Tensor:
    return tensor


AS_IT_IS = Layout(_same, _same)
TRANSPOSED = Layout(lambda w: w.mT, lambda w: w.mT)


def interleaved(head_size: int, rotated: int | None = None) -> Layout:
    """Return the layout of query and key rows for classes that rotate adjacent elements instead of halves.

    Args:
        head_size: Rows of a head.
        rotated: How many of them, at the end, are rotated; by default all.
    """
    rotated = rotated or head_size

    def moved(rows: Tensor, shape: tuple[int, int]) -> Tensor:
        heads = rows.unflatten(0, (-1, head_size))
        kept, turned = heads.split((head_size - rotated, rotated), 1)
        turned = turned.unflatten(1, shape).transpose(1, 2).flatten(1, 2)
        return torch.cat([kept, turned], 1).flatten(0, 1)

    return Layout(lambda rows: moved(rows, (2, rotated // 2)), lambda rows: moved(rows, (rotated // 2, 2)))


@dataclass(frozen=True)
class Stored:
    """How a tensor of ours is stored there.

    Attributes:
        names: Names there, in the order of the concatenation. With `{e}` in them there is a set per expert.
        layouts: Layouts of the parts, in the same order; further parts are unchanged.
        sizes: Rows of each part; None for equal parts.
        dim: The dimension of the concatenation.
        whole: The layout in which our tensor is the concatenation.
    """

    names: tuple[str, ...]
    layouts: tuple[Layout, ...] = ()
    sizes: tuple[int, ...] | None = None
    dim: int = 0
    whole: Layout = AS_IT_IS

    @property
    def _parts(self) -> list[tuple[str, Layout]]:
        as_they_are = (AS_IT_IS,) * (len(self.names) - len(self.layouts))
        return list(zip(self.names, self.layouts + as_they_are, strict=True))

    @property
    def _per_expert(self) -> bool:
        return "{e}" in self.names[0]

    def out(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield names and tensors there, as views where the layout allows."""
        if self._per_expert:
            for e, expert in enumerate(tensor.unbind()):
                for name, part in self._cut(expert):
                    yield name.replace("{e}", str(e)), part
        else:
            yield from self._cut(tensor)

    def _cut(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        tensor = self.whole.out(tensor)
        cut = tensor.chunk(len(self.names), self.dim) if self.sizes is None else tensor.split(self.sizes, self.dim)
        for (name, layout), part in zip(self._parts, cut, strict=True):
            yield name, layout.out(part)

    def back(self, get: Callable[[str], Tensor], n_expert: int) -> Tensor:
        """Return our tensor.

        Args:
            get: Returns a tensor there by its name.
            n_expert: Number of experts.
        """
        if not self._per_expert:
            return self._join(get, "")
        first = self._join(get, "0")
        # Only one expert in memory besides the stack, not a second copy of all.
        stack = first.new_empty((n_expert, *first.shape))
        stack[0] = first
        for e in range(1, n_expert):
            stack[e] = self._join(get, str(e))
        return stack

    def _join(self, get: Callable[[str], Tensor], expert: str) -> Tensor:
        parts = [layout.back(get(name.replace("{e}", expert))) for name, layout in self._parts]
        return self.whole.back(parts[0] if len(parts) == 1 else torch.cat(parts, self.dim))


Names = dict[str, str | Stored]
"""How our tensors are stored there, by our names within a layer; names of layers under `LAYER`.

A name without `.weight` or `.bias` stands for both, here and there. Tensors that a model lacks are not looked up.
"""
LAYER = "transformer.h"
_IN_LAYER = re.compile(rf"{re.escape(LAYER)}\.(\d+)\.(.+)")
BALANCING_BIAS = "e_score_correction_bias"


def rules(names: Names, ours: Iterable[str], config: "Config", rotates_neighbours: bool) -> dict[str, Stored]:
    """Return how each of our tensors is stored there, by our name.

    Args:
        names: The table.
        ours: Names of all weights of a model. Only balancing biases may be missing in the table.
        config: Its configuration.
        rotates_neighbours: Whether rotary positions rotate adjacent elements there; halves of a head are interleaved.
    """
    in_turns = _in_turns(config) if rotates_neighbours and not config.rope_interleave else {}
    found = {}
    for name in ours:
        match = _IN_LAYER.match(name)
        layer, inner = (f"{names[LAYER]}.{match[1]}.", match[2]) if match else ("", name)
        module, _, kind = inner.rpartition(".")
        if inner in names:
            stored, kind = names[inner], ""
        elif kind in ("weight", "bias") and module in names:
            stored, kind = names[module], f".{kind}"
        else:
            assert inner.endswith(BALANCING_BIAS), f"{name} has no name there"
            continue
        stored = _cut_by_heads(Stored((stored,)) if isinstance(stored, str) else stored, module, config)
        parts = tuple(f"{layer}{part}{kind}" for part in stored.names)
        found[name] = replace(stored, names=parts, layouts=in_turns.get(module, stored.layouts))
    return found


def _in_turns(config: "Config") -> dict[str, tuple[Layout, ...]]:
    if (sizes := config.latent_attention) is None:
        return {"attn.qkv": (interleaved(config.head_size),) * 2}
    rotated = sizes["qk_rope_head_dim"]
    return {
        "attn.q_b_proj": (interleaved(sizes["qk_nope_head_dim"] + rotated, rotated),),
        "attn.kv_a_proj_with_mqa": (interleaved(sizes["kv_lora_rank"] + rotated, rotated),),
    }


def _cut_by_heads(stored: Stored, module: str, config: "Config") -> Stored:
    if len(stored.names) == 1:
        return stored
    if module == "attn.qkv":
        heads = (config.n_head, config.n_query_groups, config.n_query_groups)
        return replace(stored, sizes=tuple(n * config.head_size for n in heads))
    if module == "attn.kv_b_proj":
        latent = config.latent_attention or {}
        sizes = (latent["qk_nope_head_dim"], latent["v_head_dim"])
        heads = Layout(lambda w: w.unflatten(0, (config.n_head, -1)), lambda w_HdR: w_HdR.flatten(0, 1))
        return replace(stored, sizes=sizes, dim=1, whole=heads)
    return stored
