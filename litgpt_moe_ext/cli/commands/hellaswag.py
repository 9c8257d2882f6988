"""`litgpt-moe hellaswag`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from litgpt_moe_ext.cli.arguments import required_option
from litgpt_moe_ext.field_types import PositiveInt
from litgpt_moe_ext.wording import counted


@dataclass(frozen=True)
class HellaSwag:
    """Score a checkpoint on HellaSwag from a local hellaswag_val.jsonl, by either of the two rules that circulate.

    Attributes:
        checkpoint_dir: A LitGPT checkpoint.
        file: HellaSwag's hellaswag_val.jsonl.
        rule: build-nanogpt reads raw text and normalises acc_norm by tokens; lm-eval reads cleaned text and normalises
            by characters.
        limit: Number of questions to ask, the first of the file. Default: all.
        batch_size: Endings per forward pass.
        device: Where to run, for example cuda. Default: a GPU if there is one.
        dtype: Floating point type of the weights. Default: as in the checkpoint.
        json: File to write scores and every answer to.
    """

    checkpoint_dir: Path
    file: Path = required_option()
    rule: Literal["build-nanogpt", "lm-eval"] = "lm-eval"
    limit: PositiveInt | None = None
    batch_size: PositiveInt = 16
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    json: Path | None = None

    def run(self) -> None:
        """Print both scores."""
        from litgpt_moe_ext.cli.output import progress, write_json
        from litgpt_moe_ext.evaluation.hellaswag import as_question, evaluate, load_items
        from litgpt_moe_ext.evaluation.loading import (
            check_checkpoint_dir,
            choose_device,
            load_model,
            load_tokenizer,
            parse_dtype,
        )
        from litgpt_moe_ext.evaluation.tokenization import encoder

        check_checkpoint_dir(self.checkpoint_dir)
        items = load_items(self.file, self.limit)
        encode = encoder(load_tokenizer(self.checkpoint_dir))
        questions = [as_question(item, self.rule, encode) for item in items]
        model = load_model(self.checkpoint_dir, choose_device(self.device), parse_dtype(self.dtype))
        with progress("Scoring", 4 * len(items)) as advance:
            answers = evaluate(model, questions, self.batch_size, advance)
        n = len(answers)
        scores = {name: sum(getattr(answer, name) for answer in answers) / n for name in ("acc", "acc_norm")}
        errors = {name: (score * (1 - score) / max(n - 1, 1)) ** 0.5 for name, score in scores.items()}
        print(
            f"HellaSwag, rule {self.rule}, {counted(n, 'question')}: "
            + ", ".join(f"{name} {score:.4f} ± {errors[name]:.4f}" for name, score in scores.items())
        )
        if self.json is not None:
            detail = [{**vars(answer), "acc": answer.acc, "acc_norm": answer.acc_norm} for answer in answers]
            asked = {"checkpoint": str(self.checkpoint_dir), "file": str(self.file), "rule": self.rule, "questions": n}
            write_json(self.json, {**asked, **scores, "stderr": errors, "answers": detail})
