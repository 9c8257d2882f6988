"""Exports open in transformers 5, and what it opens imports."""

import pytest
import torch
from litgpt import GPT

from litgpt_moe_ext.export.hf.read import import_checkpoint
from litgpt_moe_ext.export.hf.write import export_checkpoint
from tests.export.hf.models import CASES, TIED, make_checkpoint
from tests.export.hf.quantized import GPT_OSS_FOR_MXFP4, to_fp8, to_mxfp4
from tests.export.hf.transformers5 import compare, expect_of


@pytest.mark.slow
def test_logits_and_tokens_in_another_environment(tmp_path):
    cases = tmp_path / "cases"
    for name, tied in [*((name, False) for name in CASES), *((name, True) for name in TIED)]:
        _, settings, biased = CASES[name]
        case = f"{name}-tied" if tied else name
        model = make_checkpoint(tmp_path / "checkpoints" / case, settings, biased, tied)
        export_checkpoint(tmp_path / "checkpoints" / case, cases / case / "out")
        expect_of(model, cases / case)
    for name, changes, quantize in (
        ("gpt-oss", GPT_OSS_FOR_MXFP4, to_mxfp4),
        ("deepseek-v3", {}, lambda folder: to_fp8(folder, (4, 4))),
    ):
        _, settings, biased = CASES[name]
        checkpoint, case = tmp_path / "checkpoints" / f"{name}-quantized", cases / f"{name}-quantized"
        make_checkpoint(checkpoint, {**settings, **changes}, biased)
        export_checkpoint(checkpoint, case / "out")
        quantize(case / "out")
        config = import_checkpoint(case / "out", checkpoint / "back").config
        model = GPT(config).eval()
        model.load_state_dict(torch.load(checkpoint / "back" / "lit_model.pth", weights_only=True))
        expect_of(model, case)
    compare(cases)
