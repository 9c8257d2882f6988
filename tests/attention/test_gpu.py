"""The GPU kernels on a card: equal to the written-out softmax, forward and gradients, and no wait of the host."""

import pytest
import torch
from litgpt.model import GPT
from torch import Tensor

from litgpt_moe_ext.attention.causal_attention import causal_attention
from litgpt_moe_ext.attention.documents import find_documents, largest_extent
from litgpt_moe_ext.attention.kernels.choice import capability_of, obstacle
from litgpt_moe_ext.attention.kernels.kernel import Workload
from litgpt_moe_ext.attention.kernels.own import EAGER
from litgpt_moe_ext.attention.kernels.registry import KERNELS
from litgpt_moe_ext.attention.sinks import Softmax
from litgpt_moe_ext.tokens.rows import Rows
from tests.models import attention_config

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
B, H, G, T, MARK = 2, 4, 2, 200, 7
# Relative to the largest element of the expected tensor.
TOLERANCE = {torch.float32: 2e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (actual.float() - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1e-6)
    assert error <= tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize("has_sinks", [True, False])
@pytest.mark.parametrize("pattern", ["causal", "window", "documents", "window and documents", "counted documents"])
@pytest.mark.parametrize("head_size", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", [name for name, kernel in KERNELS.items() if kernel.device == "cuda"])
def test_a_kernel_equals_the_definition(
    name: str, dtype: torch.dtype, head_size: int, pattern: str, has_sinks: bool
) -> None:
    needs = ("gradient", *(need for need in ("window", "documents") if need in pattern))
    workload = Workload("cuda", capability_of(CUDA), str(dtype).removeprefix("torch."), head_size, needs)
    if reason := obstacle(KERNELS[name], workload):
        pytest.skip(reason)
    torch.manual_seed(0)
    shapes = (B, H, T, head_size), (B, G, T, head_size), (B, G, T, head_size), (H,)
    exact = [torch.randn(shape, device=CUDA).to(dtype).double().requires_grad_() for shape in shapes]
    inputs = [x.detach().to(dtype).requires_grad_() for x in exact]
    window = 33 if "window" in pattern else None
    documents = None
    if "documents" in pattern:
        # Moved ids are counted on the host, those made on the card are not.
        made_on = "cpu" if "counted" in pattern else CUDA
        ids = torch.randint(12, (B, T + 1), device=made_on).as_subclass(Rows).to(CUDA)[:, :T]
        documents = find_documents(ids, "eos", MARK)
        assert documents.offsets is not None
        assert (documents.offsets.numel() <= largest_extent(B, T).documents) == ("counted" in pattern)

    def attend(tensors: list[Tensor], backend: str) -> Tensor:
        q, k, v, sinks = tensors
        softmax = Softmax(sinks if has_sinks else None, head_size**-0.5, backend=backend)
        return causal_attention(q, k, v, softmax, window, documents)

    out, expected = attend(inputs, name), attend(exact, EAGER)
    assert_close(out, expected, TOLERANCE[dtype])
    n = 4 if has_sinks else 3
    dout = torch.randn_like(expected).to(dtype)
    grads = torch.autograd.grad(out, inputs[:n], dout)
    for grad, expected_grad in zip(grads, torch.autograd.grad(expected, exact[:n], dout.double()), strict=True):
        assert_close(grad, expected_grad, TOLERANCE[dtype])


@pytest.mark.parametrize("has_sinks", [True, False])
def test_a_step_waits_for_nothing(has_sinks: bool) -> None:
    documents = {"attention_document_boundary": "eos", "attention_document_token_id": MARK}
    config = attention_config(
        head_size=64, attention_sinks=has_sinks, sliding_window_size=9, sliding_window_indices=[0, 1], **documents
    )
    model = GPT(config).to(CUDA)
    idx_BT = torch.randint(40, (2, 32), device=CUDA)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16 if capability_of(CUDA) >= (8, 0) else torch.float16):
            loss = model(idx_BT).float().square().mean()
        loss.backward()

    step()  # what is loaded or chosen only once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_short_texts_with_many_documents_do_not_end_the_context() -> None:
    config = attention_config(attention_document_boundary="eos", attention_document_token_id=MARK, block_size=2048)
    model = GPT(config).to(CUDA).eval()
    few, many = (torch.full((1, length), MARK, device=CUDA) for length in (31, 2000))
    with torch.inference_mode(), torch.autocast("cuda", torch.float16):
        assert model(few).isfinite().all()
        # More documents than there is room for: NaN where a kernel needed the room, never a failed assertion.
        model(many)
    torch.cuda.synchronize()
