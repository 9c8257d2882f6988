"""`litgpt-moe benchmark-generation`."""

from pathlib import Path
from typing import Literal


def benchmark_generation(
    model: Path,
    batch_sizes: list[int] = [1, 8],  # noqa: B006
    prompt_length: int = 128,
    new_tokens: int = 32,
    rounds: int = 5,
    device: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    json: Path | None = None,
) -> None:
    """Prefill and decode speed, against a dense twin and LitGPT's LLaMAMoE with the same weights, in one run.

    Args:
        model: A checkpoint directory, or a recipe, whose model gets random weights.
        batch_sizes: Sequences generated at once, as a list: one measurement for each.
        prompt_length: Tokens of the prompt.
        new_tokens: Tokens to write.
        rounds: Measured rounds, in each of which every model takes its turn; the medians are reported.
        device: Where to run, for example cuda. Default: a GPU if there is one.
        dtype: Floating point type of weights and cache.
        json: File to write the figures to.
    """
    settings = {"batch_sizes": min(batch_sizes, default=0), "prompt_length": prompt_length, "rounds": rounds}
    for name, value in settings.items():
        if value < 1:
            raise ValueError(f"{name}: {value} must be at least 1")
    if new_tokens < 2:
        raise ValueError(f"new_tokens: {new_tokens} must be at least 2, of which the first is the prefill's")
    import litgpt_moe_ext
    from litgpt_moe_ext.cli.commands.output import progress, write_json

    litgpt_moe_ext.register()
    import torch

    from litgpt_moe_ext.evaluation.loading import check_checkpoint_dir, choose_device, load_model
    from litgpt_moe_ext.inspect.generation import Workload, benchmark, contenders, initialized
    from litgpt_moe_ext.inspect.recipes import load_recipe

    target = choose_device(device)
    config = load_recipe(model).config
    if prompt_length + new_tokens > config.block_size:
        raise ValueError(
            f"prompt_length: {prompt_length} and new_tokens: {new_tokens} are more than the model's block size of "
            f"{config.block_size}"
        )
    if model.is_dir():
        check_checkpoint_dir(model)
        loaded = load_model(model, target, getattr(torch, dtype))
    else:
        torch.manual_seed(0)
        loaded = initialized(config).to(device=target, dtype=getattr(torch, dtype))
    models, reasons = contenders(loaded)
    workload = Workload(tuple(batch_sizes), prompt_length, new_tokens, rounds)
    with progress("Generating", len(models) * len(batch_sizes) * (rounds + 1)) as advance:
        timings = benchmark(models, workload, advance)
    print_timings(timings, f"{config.name}, {target}, {dtype}, {torch.get_num_threads()} threads", workload)
    for reason in reasons:
        print(reason)
    if json is not None:
        write_json(json, {"workload": vars(workload), "timings": [vars(timing) for timing in timings]})


def print_timings(timings: list, title: str, workload) -> None:
    """Print a table of `Timing`s of a `Workload`."""
    from litgpt_moe_ext.cli.commands.output import print_table

    columns = ("model", "batch", "1st token ms", "prefill/s", "decode/s", "weights MiB", "KV MiB")
    rows = [
        (t.model, str(t.batch_size), f"{1e3 * t.time_to_first_token:.1f}", f"{t.prefill:,.0f}", f"{t.decode:,.1f}",
         f"{t.weights / 2**20:.1f}", f"{t.kv_cache / 2**20:.1f}")
        for t in timings
    ]  # fmt: skip
    shape = f"prompt {workload.prompt_length}, {workload.new_tokens} new tokens, medians of {workload.rounds} rounds"
    print_table(f"{title}; {shape}; speeds in tokens per second", columns, rows)
