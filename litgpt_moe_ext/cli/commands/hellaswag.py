"""`litgpt-moe hellaswag`."""

from pathlib import Path
from typing import Literal


def hellaswag(
    checkpoint_dir: Path,
    file: Path | None = None,
    rule: Literal["build-nanogpt", "lm-eval"] = "lm-eval",
    limit: int | None = None,
    batch_size: int = 16,
    device: str | None = None,
    dtype: str | None = None,
    json: Path | None = None,
) -> None:
    """HellaSwag from a local hellaswag_val.jsonl, by either of the two rules that circulate.

    Args:
        checkpoint_dir: A LitGPT checkpoint.
        file: HellaSwag's hellaswag_val.jsonl; must be given.
        rule: build-nanogpt: raw text, acc_norm per token. lm-eval: cleaned text, acc_norm per character.
        limit: Ask only the first so many questions.
        batch_size: Endings per forward pass.
        device: Where to run, for example cuda. Default: a GPU if there is one.
        dtype: Floating point type of the weights. Default: that of the checkpoint.
        json: File to write scores and every answer to.
    """
    if file is None:
        raise ValueError("file: None; give HellaSwag's validation file, --file hellaswag_val.jsonl")
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: {value} must be at least 1")
    import litgpt_moe_ext
    from litgpt_moe_ext.cli.commands.output import progress, write_json

    litgpt_moe_ext.register()

    from litgpt_moe_ext.evaluation.hellaswag import as_question, encoder, evaluate, load_items
    from litgpt_moe_ext.evaluation.loading import (
        check_checkpoint_dir,
        choose_device,
        load_model,
        load_tokenizer,
        parse_dtype,
    )

    check_checkpoint_dir(checkpoint_dir)
    parsed_dtype = parse_dtype(dtype)
    items = load_items(file, limit)
    encode = encoder(load_tokenizer(checkpoint_dir))
    questions = [as_question(item, rule, encode) for item in items]
    target = choose_device(device)
    model = load_model(checkpoint_dir, target, parsed_dtype)
    with progress("Scoring", 4 * len(items)) as advance:
        answers = evaluate(model, questions, batch_size, advance)
    n = len(answers)
    scores = {name: sum(getattr(answer, name) for answer in answers) / n for name in ("acc", "acc_norm")}
    errors = {name: (score * (1 - score) / max(n - 1, 1)) ** 0.5 for name, score in scores.items()}
    print(
        f"HellaSwag, rule {rule}, {n:,} questions: "
        + ", ".join(f"{name} {score:.4f} ± {errors[name]:.4f}" for name, score in scores.items())
    )
    if json is not None:
        detail = [{**vars(answer), "acc": answer.acc, "acc_norm": answer.acc_norm} for answer in answers]
        content = {"checkpoint": str(checkpoint_dir), "file": str(file), "rule": rule, "questions": n, **scores}
        write_json(json, {**content, "stderr": errors, "answers": detail})
