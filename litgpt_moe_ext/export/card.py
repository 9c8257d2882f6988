"""The model card of an export: what is known about the model's training, and how to use it."""

import csv
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt_moe_ext.export.facts import left_out
from litgpt_moe_ext.model_size import count_flops, count_parameters
from litgpt_moe_ext.training.checkpoint import hyperparameters
from litgpt_moe_ext.training.checkpoint.progress import sequences_of, step_of
from litgpt_moe_ext.training.logs import METRICS_FILE

if TYPE_CHECKING:
    from litgpt_moe_ext.export.architecture import Architecture
    from litgpt_moe_ext.export.source import Source

_CARD = """---
library_name: {library}
pipeline_tag: text-generation
tags: [{tags}]
---

# {name}

Trained with [LitGPT](https://github.com/Lightning-AI/litgpt) and `litgpt_moe_ext`; exported as `{class_name}` by
`litgpt-moe export {checkpoint} ... {flags}`.

| | |
| --- | --- |
{rows}

{usage}
{training}"""
_TRAINING = f"""
## Training

`litgpt-moe train --config {hyperparameters.FILE_NAME}` is the command that made it; the file is beside this one.
"""
_TRANSFORMERS = """```python
from transformers import pipeline

pipe = pipeline("text-generation", "PATH"{trust})
print(pipe("Once", max_new_tokens=40)[0]["generated_text"])
```

```bash
{serve}
```
"""
_LLAMA_CPP = """```bash
llama-cli -m model.gguf -p "Once"
```
"""


def write_card(
    folder: Path,
    source: "Source",
    architecture: "Architecture",
    format_name: str,
    dtype: str | None,
    serve: str = "",
) -> None:
    """Write `README.md`, and the settings of the training if they are known.

    Args:
        folder: The folder of the export.
        source: The checkpoint that was exported.
        architecture: The class, or the graph, that opens the export.
        format_name: `hf` or `gguf`.
        dtype: Floating type of the weights, if one was asked for.
        serve: The command with which vLLM serves it.
    """
    config = source.config
    settings = hyperparameters.read(source.directory)
    if settings:
        shutil.copyfile(*(where / hyperparameters.FILE_NAME for where in (source.directory, folder)))
    known = facts(source, settings, source.writes_once(architecture))
    if missing := left_out(config):
        known["otherwise than in training"] = "; ".join(missing)
    class_name = architecture.class_name
    trust = ", trust_remote_code=True" if class_name.startswith("LitGPT") else ""
    card = _CARD.format(
        library="transformers" if format_name == "hf" else "gguf",
        tags=", ".join(["litgpt", "litgpt_moe_ext", *(["mixture-of-experts"] if config.n_expert else [])]),
        name=config.name or source.checkpoint.resolve().parent.name,
        class_name=class_name,
        flags=f"--format {format_name}" + (f" --dtype {dtype}" if dtype else ""),
        checkpoint=_name_of(source),
        rows="\n".join(f"| {name} | {value} |" for name, value in known.items()),
        usage=_TRANSFORMERS.format(trust=trust, serve=serve) if format_name == "hf" else _LLAMA_CPP,
        training=_TRAINING if settings else "",
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def facts(source: "Source", settings: dict[str, Any], once: bool = False) -> dict[str, str]:
    """Return what is known about a model and its training, in words by name.

    Args:
        source: The checkpoint.
        settings: Settings of the training, as plain data; empty if unknown.
        once: Whether output head and token embeddings are written as one table.
    """
    config, train = source.config, settings.get("train")
    tied = once or (isinstance(train, dict) and bool(train.get("tie_embeddings")))
    size = count_parameters(config, tied)  # as all lines and pages of the run count them
    length = config.block_size
    head = (
        "the output head is the table of embeddings"
        if once
        else ("the output head, one table with the embeddings in training, is written twice")
    )
    found = {
        "parameters": f"{size.total:,}, of which {size.active:,} are active per token{f'; {head}' if tied else ''}",
        "FLOPs per token, forward": f"{count_flops(config, length, training=False) / length:,.0f}",
        "context": f"{length:,} tokens",
    }
    averaged = source.checkpoint != source.directory
    if averaged:
        found["weights"] = "moving average over the steps (`ema.decay`)"
    losses: dict[str, float] = {}
    step = step_of(source.checkpoint)
    if step is not None:
        found["optimizer steps"] = f"{step:,}"
        if isinstance(train, dict) and (sequences := sequences_of(source.checkpoint)) is not None:
            length = train.get("max_seq_length") or length
            tokens = sequences * length
            flops = count_flops(config, length, training=True) / length * tokens
            found |= {"training tokens": f"{tokens:,}", "FLOPs of the training": f"{flops:.2e}"}
        losses |= _losses(source.checkpoint.resolve().parent, step)
    best = source.run.get("callbacks", {}).get("Retention", {}).get("loss")
    if best is not None:
        losses["best validation loss"] = best
    # A run validates the weights that it trains, not their average.
    found |= {f"{name}{', before averaging' * averaged}": f"{value:.4f}" for name, value in losses.items()}
    if isinstance(data := settings.get("data"), dict):
        found["data"] = f"`{data.get('class_path')}`"
    read = (source.run.get("train_dataloader") or {}).get("fingerprint", {})
    if "corpus" in read:
        found["hash of the data"] = f"`{read['corpus']}`"
    elif "corpora" in read:  # of a mixture
        found["hashes of the data"] = ", ".join(f"{name} `{corpus}`" for name, corpus, _ in read["corpora"])
    return found


def _name_of(source: "Source") -> str:
    folder, checkpoint = source.directory.resolve(), source.checkpoint.resolve()
    return folder.name if folder == checkpoint else f"{checkpoint.name}/{folder.name}"


def _losses(out_dir: Path, step: int) -> dict[str, float]:
    # The last loss of each kind that was logged up to the step.
    names = {"train_loss": "training loss", "val_loss": "validation loss"}
    found: dict[str, float] = {}
    try:
        with (out_dir / METRICS_FILE).open(newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                if int(row["step"]) <= step:
                    found |= {name: float(row[column]) for column, name in names.items() if row.get(column)}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # a checkpoint that was moved, or a table of another kind
    return found
