"""`litgpt-moe tune`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.field_types import PositiveInt
from litgpt_moe_ext.wording import counted, quoted

if TYPE_CHECKING:
    import torch

    from litgpt_moe_ext.inspect.recipes import Recipe
    from litgpt_moe_ext.inspect.tuning import Measured, Pass, Work


@dataclass(frozen=True)
class Tune:
    """Measure which block sizes are the fastest on this GPU for the experts of a recipe, and keep them for later runs.

    It takes some minutes, most of them for compiling, and nothing else should use the GPU meanwhile. Each product is
    kept as soon as it is measured. Runs whose micro-batches have as many tokens then use these blocks. Another block
    adds up in another order, so tune before a training, not between its parts, if you want the same bits.

    Attributes:
        recipe: A recipe (YAML file), or a checkpoint directory.
        micro_batch_size: Sequences per forward pass. Default: as in the recipe.
        json: File to write all figures to.
    """

    recipe: Path
    micro_batch_size: PositiveInt | None = None
    json: Path | None = None

    def run(self) -> None:
        """Measure, keep and print."""
        from litgpt_moe_ext.cli.output import progress
        from litgpt_moe_ext.inspect.recipes import load_recipe

        recipe = load_recipe(self.recipe)
        _require_triton(recipe, self.recipe)
        import torch

        from litgpt_moe_ext.cli.paths import check_written
        from litgpt_moe_ext.inspect.tuning import measure
        from litgpt_moe_ext.moe.kernels.triton.tiling import tuned_tiles
        from litgpt_moe_ext.training.phases.checks import check_length

        device = torch.device("cuda", torch.cuda.current_device())
        file = tuned_tiles.file_of(device)
        check_written("XDG_CACHE_HOME", file)
        check_length(recipe.sequence_length, recipe.config.block_size)
        batch = (self.micro_batch_size or recipe.settings.train.micro_batch_size, recipe.sequence_length)
        how = _how(recipe, batch)
        works = _products(recipe, how, device)
        found: list[Measured] = []
        with progress("Measuring", len(works)) as advance:
            for work in works:
                found.append(measure(work, device))
                tuned_tiles.keep(work, found[-1].tuned, device)
                self._write(found, batch)
                advance(1)
        _print_times(found, f"{torch.cuda.get_device_name()}, micro-batches of {batch[0]} x {batch[1]} tokens")
        if not any(measured.tuned for measured in found):
            print("No other block is clearly faster than those that runs have anyway, so nothing is kept.")
            return
        print(f"Kept in {file}, for every run on this kind of card with as many tokens in a micro-batch.")
        print("To go back, delete that file.")

    def _write(self, found: "Sequence[Measured]", batch: tuple[int, int]) -> None:
        if self.json is None:
            return
        import torch
        import triton

        from litgpt_moe_ext.cli.output import write_json

        card = {"card": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
        rows = [{"name": str(m.work), **m._asdict(), "work": m.work._asdict()} for m in found]
        write_json(self.json, {**card, "micro_batch": batch, "products": rows})


def _require_triton(recipe: "Recipe", path: Path) -> None:
    import torch

    from litgpt_moe_ext.inspect.doctor.run_here import computing
    from litgpt_moe_ext.meta.models import meta_model
    from litgpt_moe_ext.moe.experts import Experts

    experts = next((m for m in meta_model(recipe.config).modules() if isinstance(m, Experts)), None)
    if experts is None:
        raise SettingsError(f"recipe: {quoted(path)} must have experts of this package, whose products can be measured")
    if not torch.cuda.is_available():
        raise SettingsError("tune: needs a GPU, and torch finds none here; `litgpt-moe doctor` says more")
    device, dtype, autocast = computing(recipe)
    with autocast:
        backend = experts.backend_for(torch.empty(1, experts.n_embd, device=device, dtype=dtype))
    if backend != "triton":
        raise SettingsError(
            f"recipe: {quoted(path)} has its experts computed by {backend} here, which has no blocks to choose; tune "
            "is for triton (expert_backend)"
        )


def _how(recipe: "Recipe", batch: tuple[int, int]) -> "Pass":
    from litgpt_moe_ext.inspect.doctor.run_here import computing
    from litgpt_moe_ext.inspect.tuning import Pass

    _, dtype, autocast = computing(recipe)
    return Pass(batch, dtype, autocast, add=recipe.settings.train.global_batch_size > batch[0])


def _products(recipe: "Recipe", how: "Pass", device: "torch.device") -> "list[Work]":
    import torch

    from litgpt_moe_ext.inspect.tuning import products_of

    try:
        return products_of(recipe.config, how, device)
    except torch.OutOfMemoryError as error:
        raise SettingsError(
            f"micro_batch_size: {how.batch[0]} does not fit into the memory of this GPU; take a smaller one, here and "
            "in training"
        ) from error


def _print_times(found: "Sequence[Measured]", title: str) -> None:
    from litgpt_moe_ext.cli.output import print_table

    rows = [
        (
            str(measured.work),
            str(measured.table),
            f"{measured.table_us:.1f}",
            str(measured.best) if measured.best != measured.table else "the same",
            f"{measured.best_us:.1f}",
        )
        for measured in found
    ]
    print_table(title, ("product", "block", "us", "fastest", "us"), rows)
    before, after = (sum(getattr(m, name) for m in found) for name in ("table_us", "best_us"))
    print(f"{counted(len(found), 'product')}: {before:.0f} us before, {after:.0f} us with the fastest blocks.")
