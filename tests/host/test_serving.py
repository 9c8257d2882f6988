"""`litgpt serve` and `litgpt chat` at requests that a model cannot serve."""

import litgpt
import pytest
from fastapi import HTTPException
from tokenizers import Tokenizer, models

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.host.serving import answering


def test_a_refused_request_has_an_answer():
    """Also where the model writes piece by piece."""

    def refuse(_prompt):
        raise SettingsError("prompt: '' has no tokens")

    def stream(prompt):
        yield prompt
        raise NotImplementedError("max_seq_length 32 needs to be >= 40")  # as LitGPT raises it

    def fail(_prompt):
        raise NotImplementedError("Could not run 'aten::topk' on this device")  # as torch does: no fault of the prompt

    with pytest.raises(HTTPException) as refused:
        answering(refuse)("")
    assert (refused.value.status_code, refused.value.detail) == (400, "prompt: '' has no tokens")
    pieces = answering(stream)("a")
    assert next(pieces) == "a"
    with pytest.raises(HTTPException, match=r"too long .max_seq_length 32 needs to be >= 40.; send a shorter one"):
        next(pieces)
    with pytest.raises(NotImplementedError):
        answering(fail)("a")
    assert answering(str.upper)("a") == "A"


def test_a_prompt_that_is_not_unicode_is_refused():
    tokenizer = litgpt.Tokenizer.__new__(litgpt.Tokenizer)
    tokenizer.backend, tokenizer.processor = "huggingface", Tokenizer(models.BPE())
    with pytest.raises(SettingsError, match=r"^prompt: 'a.udcff' cannot be read: it has bytes that are no letters"):
        tokenizer.encode("a\udcff")
    with pytest.raises(TypeError):
        tokenizer.encode(None)
