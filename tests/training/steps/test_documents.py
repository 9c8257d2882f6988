"""In training a model knows the ids of its batch in host memory, so that attention starts blocks for its documents."""

from typing import Any

import pytest
import torch

from litgpt_moe_ext.attention import gpt_forward
from litgpt_moe_ext.attention.documents import largest_extent, needed_extent
from litgpt_moe_ext.data.windows import Windows
from litgpt_moe_ext.tokens.rows import Rows
from tests.runs import train


@pytest.mark.parametrize(("packing", "boundary"), [("stream", "eos"), ("best_fit", "bos")])
def test_every_forward_pass_of_a_run_knows_its_documents(
    recipe: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, packing: str, boundary: str
) -> None:
    """Also with gradient accumulation, with padding, and in validation; whole batches of ids, never another's."""
    seen = []
    original = gpt_forward.find_documents

    def spy(idx_BT: torch.Tensor, *boundary: Any) -> Any:
        documents = original(idx_BT, *boundary)
        if not idx_BT.is_meta:
            assert documents.lengths is not None
            extent = needed_extent(idx_BT, *boundary)
            assert extent.documents == len(documents.lengths)
            assert extent.longest == min(128, idx_BT.size(1))
            seen.append(extent != largest_extent(*idx_BT.shape))
        return documents

    monkeypatch.setattr(gpt_forward, "find_documents", spy)
    gather = Windows.gather
    # As if the batches went to a GPU.
    monkeypatch.setattr(Windows, "gather", lambda *arguments: gather(*arguments).as_subclass(Rows))
    text = tmp_path / "text.txt"
    text.write_text("\n".join("one two three " * (1 + number % 7) for number in range(120)))
    corpus = {"data_path": str(tmp_path / "prepared"), "source_path": str(text), "separator": "\n"}
    data = {
        "class_path": "litgpt_moe_ext.data.TextCorpus",
        "init_args": corpus | {"bpe": {"vocab_size": 280}, "val_fraction": 0.2, "packing": packing},
    }
    # The token that this corpus has between its documents.
    changes = {"attention_document_boundary": boundary, "attention_document_token_id": 0}
    file = recipe(data=data, model_config=changes, train={"max_tokens": 3 * 4 * 32}, eval={"interval": 2})
    assert train("--config", file) == 0
    assert len(seen) > 3 * 2  # micro-batches of the steps, and validations
    assert all(seen)
