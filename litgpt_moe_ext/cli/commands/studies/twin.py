"""`litgpt-moe twin`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.field_types import NonNegativeInt, PositiveInt
from litgpt_moe_ext.wording import in_shell, quoted

if TYPE_CHECKING:
    from litgpt_moe_ext.study.twin import Experts


@dataclass(frozen=True)
class Twin:
    """Write the recipe of a model's twin: equal cost per token, everything else alike.

    An MoE recipe gives its dense twin, a dense recipe with `--n_expert` an MoE twin. The router, shared experts,
    attention and the output head are counted; the costs are equal to 0.5 %.

    Attributes:
        recipe: A recipe (YAML file) with model_config.
        out: File to write, which must not exist.
        by: What is equal: the FLOPs of a training step, or the parameters that work on a token.
        n_expert: Routed experts of an MoE twin. Default: a dense twin.
        granularity: Experts of an MoE twin that work on a token, shared ones included; each is about one in this many
            parts of the dense layer.
        n_shared_expert: How many of these every token visits.
        sparsity: Routed experts over those that a token visits; another way to give n_expert.
    """

    recipe: Path
    out: Path
    by: Literal["flops", "parameters"] = "flops"
    n_expert: PositiveInt | None = None
    granularity: PositiveInt = 2
    n_shared_expert: NonNegativeInt = 0
    sparsity: PositiveInt | None = None

    def run(self) -> None:
        """Write the twin's recipe."""
        from litgpt_moe_ext.cli.output import write_text
        from litgpt_moe_ext.study.recipes import twin_text

        if not self.recipe.is_file():
            raise SettingsError(f"recipe: {quoted(self.recipe)} must be a recipe (YAML file)")
        if self.out.exists():
            raise SettingsError(f"out: {quoted(self.out)} exists; name a new file")
        experts = self._experts()
        kind = "dense" if experts is None else "MoE"
        what = "FLOPs of a training step" if self.by == "flops" else "active parameters"
        header = (
            f"The {kind} twin of {self.recipe.name}: equal {what} to 0.5 %, everything else alike.",
            f"    {self._command()}",
        )
        write_text(self.out, twin_text(self.recipe, self.by, experts, header))
        card = in_shell("litgpt-moe", "model-card", self.out)
        print(f"Wrote {self.out}, the {kind} twin of {self.recipe} by {self.by}; `{card}` shows its cost")

    def _experts(self) -> "Experts | None":
        from litgpt_moe_ext.study.twin import Experts

        if self.n_expert is not None and self.sparsity is not None:
            raise SettingsError(f"sparsity: {self.sparsity} must not be given beside n_expert; leave one of them out")
        if self.n_expert is None and self.sparsity is None:
            for name in ("granularity", "n_shared_expert"):
                if (value := getattr(self, name)) != getattr(Twin, name):
                    raise SettingsError(f"{name}: {value} is for an MoE twin; give --n_expert or --sparsity as well")
        n_expert = self.n_expert
        if self.sparsity is not None:
            n_expert = self.sparsity * max(1, self.granularity - self.n_shared_expert)
        return None if n_expert is None else Experts(n_expert, self.granularity, self.n_shared_expert)

    def _command(self) -> str:
        options = {"by": self.by}
        if self.n_expert or self.sparsity:
            many = {"n_expert": self.n_expert} if self.n_expert else {"sparsity": self.sparsity}
            options |= {**many, "granularity": self.granularity, "n_shared_expert": self.n_shared_expert}
        given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        return in_shell("litgpt-moe", "twin", self.recipe, self.out, *given)
