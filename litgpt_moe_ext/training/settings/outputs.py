"""Settings of a run's outputs besides its log: samples, benchmark scores, checkpoints."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from litgpt_moe_ext.field_types import Minutes, NonNegativeFloat, PositiveInt
from litgpt_moe_ext.training.settings.section import Section

ExportFormat = Literal["hf", "gguf"]


@dataclass
class SampleArgs(Section, key="sample"):
    """Text that the model writes after every validation."""

    prompts: list[str] = field(default_factory=list)
    """Prompts to continue; empty: no samples."""
    max_new_tokens: PositiveInt = 80
    """Tokens to generate per prompt."""
    temperature: NonNegativeFloat = 0.8
    """Divides the logits before sampling; 0 takes the likeliest token."""
    top_k: PositiveInt | None = 50
    """Sample only among this many likeliest tokens; null: among all."""


@dataclass
class EvaluateArgs(Section, key="evaluate"):
    """Benchmarks of the model while it trains, logged beside the losses."""

    hellaswag: Path | None = None
    """Path of HellaSwag's hellaswag_val.jsonl; null: no HellaSwag."""
    hellaswag_rule: Literal["build-nanogpt", "lm-eval"] = "lm-eval"
    """build-nanogpt: raw text, acc_norm per token; lm-eval: cleaned text, acc_norm per character."""
    tasks: list[Path] = field(default_factory=list)
    """Local YAML files of lm-eval tasks."""
    every_steps: PositiveInt | None = None
    """Optimizer steps between evaluations; null: after every validation."""
    max_items: PositiveInt | None = None
    """Evaluate only this many questions of each benchmark, from the start; null: all."""
    batch_size: PositiveInt = 32
    """Texts that go through the model at once on each device."""

    def problems(self) -> Iterator[str]:
        """See `Section.problems`."""
        if self.every_steps is not None and not self.wanted:
            yield (
                f"evaluate.every_steps: {self.every_steps} evaluates nothing; set evaluate.hellaswag or evaluate.tasks"
            )

    @property
    def wanted(self) -> bool:
        """Whether there is anything to evaluate."""
        return self.hellaswag is not None or bool(self.tasks)


@dataclass
class CheckpointArgs(Section, key="checkpoint"):
    """Which checkpoints to save besides those of train.save_interval and the final one, to keep and to export."""

    every_epoch: bool = False
    """Also save at the end of every epoch of the data."""
    every_minutes: Minutes | None = None
    """Also save this many minutes after the last checkpoint; null: only by steps."""
    keep_last: PositiveInt | None = None
    """Number of step-* directories to keep; older ones are deleted; null: all."""
    keep_earlier: PositiveInt | None = None
    """Number of earlier runs of this out_dir to keep; a new run moves them to OUT_DIR-earlier-N; null: all."""
    best: bool = True
    """Keep the checkpoint with the lowest validation loss as best/."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """If a checkpoint cannot be written (disk full): end the run, or continue without it."""
    export: ExportFormat | list[ExportFormat] | None = None
    """hf, gguf or a list of both: at the end, export best/ and final/ as litgpt-moe export does; null: no export."""

    @property
    def export_formats(self) -> list[ExportFormat]:
        """The formats to export to."""
        return self.export if isinstance(self.export, list) else [] if self.export is None else [self.export]
