"""Lists of tensors that this card copies, against torch's copies."""

import pytest
import torch

from litgpt_moe_ext.moe.kernels import copying
from tests.gpu.card import no_waits, require_bfloat16

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("sizes", [(1,), (0, 3, 70_000), (512, 1024) * 64, (2**18,) * 8], ids=str)
@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16], ids=str)
def test_equals_torch(device, sizes, narrow):
    if device.type == "cpu":
        pytest.skip("the kernel needs a card; tests/moe interprets it")
    if narrow == torch.bfloat16:
        require_bfloat16(device)
    wide = [torch.randn(size, device=device) for size in sizes]
    for sources, dtype in ((wide, narrow), ([x.to(narrow) for x in wide], torch.float32)):
        targets = [torch.empty_like(x, dtype=dtype) for x in sources]
        assert copying._works_on(targets, sources)
        copying.copy_each(targets, sources)
        with no_waits(device):
            copying.copy_each(targets, sources)
        for source, target in zip(sources, targets, strict=True):
            assert torch.equal(target, source.to(dtype))
