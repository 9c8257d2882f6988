"""`litgpt-moe upcycle`."""

from dataclasses import dataclass
from pathlib import Path

from litgpt_moe_ext.field_types import NonNegativeInt
from litgpt_moe_ext.wording import in_shell


@dataclass(frozen=True)
class Upcycle:
    """Turn a dense checkpoint into a Mixture-of-Experts checkpoint that computes the same, to train on from there.

    Attributes:
        dense_dir: LitGPT checkpoint directory of the dense model.
        recipe: YAML file of the MoE model, which must equal the dense model in everything but its MLP.
        out_dir: Directory of the new checkpoint, which must not exist.
        seed: Seed of the routers' weights.
    """

    dense_dir: Path
    recipe: Path
    out_dir: Path
    seed: NonNegativeInt = 42

    def run(self) -> None:
        """Write the MoE checkpoint."""
        from litgpt_moe_ext.export.upcycling import upcycle
        from litgpt_moe_ext.inspect.recipes import load_recipe

        upcycle(self.dense_dir, self.out_dir, load_recipe(self.recipe).config, self.seed)
        print(f"Wrote {self.out_dir}; train it with")
        places = ["--config", str(self.recipe), "--initial_checkpoint_dir", str(self.out_dir)]
        print(f"  {in_shell('litgpt-moe', 'train', *places)}")
