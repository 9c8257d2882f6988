"""`litgpt-moe benchmark-generation`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.field_types import AtLeastTwo, PositiveInt
from litgpt_moe_ext.wording import counted

if TYPE_CHECKING:
    import torch
    from litgpt import GPT

    from litgpt_moe_ext.inspect.generation import Timing, Workload


@dataclass(frozen=True)
class BenchmarkGeneration:
    """Measure prefill and decode speed beside a dense twin and LitGPT's LLaMAMoE with the same weights, in one run.

    Works for every recipe and checkpoint. LLaMAMoE is included only if it can express the model (see
    `litgpt-moe convert-experts --help`); otherwise a line names the setting in the way.

    Attributes:
        model: A checkpoint directory, or a recipe, whose model gets random weights.
        batch_sizes: Numbers of sequences generated at once, one measurement for each.
        prompt_length: Tokens of the prompt.
        new_tokens: Tokens to write; the first belongs to the prefill.
        rounds: Measured rounds, in each of which every model takes its turn; the medians are reported.
        device: Where to run, for example cuda. Default: a GPU if there is one.
        dtype: Floating point type of weights and cache.
        json: File to write the figures to.
    """

    model: Path
    batch_sizes: list[PositiveInt] = field(default_factory=lambda: [1, 8])
    prompt_length: PositiveInt = 128
    new_tokens: AtLeastTwo = 32
    rounds: PositiveInt = 5
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    json: Path | None = None

    def run(self) -> None:
        """Print the table of speeds."""
        import torch

        from litgpt_moe_ext.cli.output import progress, write_json
        from litgpt_moe_ext.inspect.generation import Workload, benchmark, contenders

        model = self._load()
        models, reasons = contenders(model)
        workload = Workload(tuple(self.batch_sizes), self.prompt_length, self.new_tokens, self.rounds)
        with progress("Generating", len(models) * len(self.batch_sizes) * (self.rounds + 1)) as advance:
            timings = benchmark(models, workload, advance)
        device = model.lm_head.weight.device
        title = f"{model.config.name}, {device}, {self.dtype}, {torch.get_num_threads()} threads"
        print_timings(timings, title, workload)
        for reason in reasons:
            print(reason)
        if self.json is not None:
            write_json(self.json, {"workload": vars(workload), "timings": [vars(timing) for timing in timings]})

    def _load(self) -> "GPT":
        import torch

        from litgpt_moe_ext.evaluation.loading import check_checkpoint_dir, choose_device, load_model
        from litgpt_moe_ext.inspect.generation import initialized
        from litgpt_moe_ext.inspect.recipes import load_recipe

        device, dtype = choose_device(self.device), getattr(torch, self.dtype)
        config = load_recipe(self.model).config
        if self.prompt_length + self.new_tokens > config.block_size:
            raise SettingsError(
                f"prompt_length: {self.prompt_length} and new_tokens: {self.new_tokens} must be at most the model's "
                f"block size of {config.block_size} together"
            )
        self._check_memory(config.n_embd * dtype.itemsize, device)
        if self.model.is_dir():
            check_checkpoint_dir(self.model, "model")
            return load_model(self.model, device, dtype, "model")
        torch.manual_seed(0)
        return initialized(config).to(device=device, dtype=dtype)

    def _check_memory(self, bytes_per_token: int, device: "torch.device") -> None:
        # What one layer hands to the next has to fit, before minutes are spent on smaller batches.
        from litgpt_moe_ext.machine import memory_bytes

        largest = max(self.batch_sizes)
        needed = largest * self.prompt_length * bytes_per_token
        present = memory_bytes() if device.type == "cpu" else None
        if present is not None and needed > present:
            raise SettingsError(
                f"batch_sizes: {largest} needs {needed / 2**30:,.0f} GiB between two layers, and there are "
                f"{present / 2**30:,.0f} GiB; take smaller batches, or a shorter prompt_length"
            )


def print_timings(timings: "Sequence[Timing]", title: str, workload: "Workload") -> None:
    """Print a table of the timings of a workload."""
    from litgpt_moe_ext.cli.output import print_table

    columns = ("model", "batch", "1st token ms", "prefill/s", "decode/s", "weights MiB", "KV MiB")
    rows = [
        (t.model, str(t.batch_size), f"{1e3 * t.time_to_first_token:.1f}", f"{t.prefill:,.0f}", f"{t.decode:,.1f}",
         f"{t.weights / 2**20:.1f}", f"{t.kv_cache / 2**20:.1f}")
        for t in timings
    ]  # fmt: skip
    shape = (
        f"prompt {workload.prompt_length}, {workload.new_tokens} new, medians of {counted(workload.rounds, 'round')}"
    )
    print_table(f"{title}; {shape}; speeds in tokens per second", columns, rows)
