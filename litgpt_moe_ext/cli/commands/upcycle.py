"""`litgpt-moe upcycle`."""

from pathlib import Path


def upcycle(dense_dir: Path, recipe: Path, out_dir: Path, seed: int = 42) -> None:
    """Turn a dense checkpoint into a Mixture-of-Experts checkpoint that computes the same, to train on from there.

    Args:
        dense_dir: LitGPT checkpoint directory of the dense model.
        recipe: YAML file of the MoE model. Everything but its MLP must be that of the dense model.
        out_dir: The new checkpoint's directory, which must not exist.
        seed: Of the routers' weights.
    """
    import litgpt_moe_ext

    litgpt_moe_ext.register()
    from litgpt_moe_ext.export import upcycling
    from litgpt_moe_ext.inspect.recipes import load_recipe

    upcycling.upcycle(dense_dir, out_dir, load_recipe(recipe).config, seed)
    print(f"Wrote {out_dir}; train it with")
    print(f"  run_train.py --config {recipe} --initial_checkpoint_dir {out_dir}")
