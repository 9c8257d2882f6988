"""Lists of tensors copied by Triton's interpreter: not collected by itself, `tests/test_triton.py` runs it."""

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, Phase, given, settings

from litgpt_moe_ext.moe.kernels.triton.copying import copy_each
from tests.moe.interpreted_triton import EXAMPLES


@given(
    sizes=st.lists(st.integers(0, 1300), min_size=1, max_size=5), seed=st.integers(0, 99),
    dtypes=st.sampled_from([(torch.float32, torch.float16), (torch.float16, torch.float32), (torch.float32,) * 2]),
)  # fmt: skip
@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
def test_any_sizes(sizes, dtypes, seed):
    torch.manual_seed(seed)
    sources = [torch.randn(size, dtype=dtypes[0]) for size in sizes]
    targets = [torch.full((size + 1,), 7.0, dtype=dtypes[1]) for size in sizes]
    copy_each([target[:-1] for target in targets], sources)
    for source, target in zip(sources, targets, strict=True):
        assert torch.equal(target[:-1], source.to(dtypes[1]))
        assert target[-1] == 7.0
