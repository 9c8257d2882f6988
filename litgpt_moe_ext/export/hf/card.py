"""The model card of an export: what is known of how the model came to be."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from litgpt_moe_ext.model_size import count_flops, count_parameters

if TYPE_CHECKING:
    from litgpt_moe_ext.config.types import Config

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [litgpt, litgpt_moe_ext{moe}]
---

# {name}

Trained with [LitGPT](https://github.com/Lightning-AI/litgpt) and `litgpt_moe_ext`; exported as `{class_name}` by
`litgpt-moe export {checkpoint} ...`.

| | |
| --- | --- |
{rows}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH"{trust})
inputs = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```

## Settings of the training

```yaml
{settings}```
"""


def model_card(checkpoint_dir: Path, config: "Config", class_name: str) -> str:
    """Return the text of `README.md`.

    Args:
        checkpoint_dir: The checkpoint that was exported.
        config: Its model configuration.
        class_name: The class that opens the export.
    """
    size = count_parameters(config)
    flops = count_flops(config, config.block_size, training=False) / config.block_size
    settings = _read_yaml(checkpoint_dir / "hyperparameters.yaml")
    own = class_name.startswith("LitGPT")
    rows = {
        "parameters": f"{size.total:,}, of which {size.active:,} are active per token",
        "FLOPs per token, forward": f"{flops:,.0f}",
        "context": f"{config.block_size:,} tokens",
        **_facts_of_training(checkpoint_dir, settings),
    }
    return _CARD.format(
        moe=", mixture-of-experts" if config.n_expert else "",
        name=config.name or checkpoint_dir.resolve().parent.name,
        class_name=class_name,
        checkpoint=checkpoint_dir.name,
        rows="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        trust=", trust_remote_code=True" if own else "",
        settings=yaml.safe_dump({k: v for k, v in settings.items() if k != "model_config"}, sort_keys=False),
    )


def _facts_of_training(checkpoint_dir: Path, settings: dict[str, Any]) -> dict[str, str]:
    facts = {}
    try:
        state = json.loads((checkpoint_dir / "training_state.json").read_text(encoding="utf-8"))
        facts["optimizer steps"] = f"{state['step']:,}"
    except (OSError, ValueError, KeyError):
        pass  # a converted checkpoint has no such file
    data = settings.get("data")
    if isinstance(data, dict):
        facts["data"] = f"`{data.get('class_path')}`"
    return facts


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}
