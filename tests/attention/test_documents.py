"""Documents in a packed sequence: exact isolation, equality with separate forwards, and the way to the layers."""

import math
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from litgpt.model import GPT
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from litgpt_moe_ext.attention import gpt_forward
from litgpt_moe_ext.attention.causal_attention import causal_attention
from litgpt_moe_ext.attention.documents import (
    Documents,
    Extent,
    document_mask,
    document_offsets,
    find_documents,
    largest_extent,
    needed_extent,
)
from litgpt_moe_ext.attention.sinks import Softmax
from litgpt_moe_ext.tokens.padding import PADDING, PaddedRows
from litgpt_moe_ext.tokens.rows import Rows
from tests.models import attention_config, randomize

MARK = 39
T = 20
VARIANTS = [
    {},
    {"attention_sinks": False},
    {"sliding_window_size": 3},
    {"sliding_window_size": 3, "attention_sinks": False, "sliding_window_indices": [0, 1]},
    {"attention_document_restart_positions": True, "rope_base": 50},
    {"attention_document_boundary": "bos"},
    {"attention_document_boundary": "bos", "attention_document_restart_positions": True},
    {"attention_document_restart_positions": True, "rope_local_base_freq": 100.0, "rope_indices": [0, 1]},
    {"attention_document_restart_positions": True, "position_embedding": "learned", "rotary_percentage": 0.0},
    {"position_embedding": "learned", "rotary_percentage": 0.0},
]


def make_model(**changes: Any) -> GPT:
    documents = {"attention_document_boundary": "eos", "attention_document_token_id": MARK, **changes}
    return randomize(GPT(attention_config(**documents)).double())


def tokens(marks: dict[int, list[int]], boundary: str = "eos") -> torch.Tensor:
    """Random tokens with the mark after each given number of tokens (eos), or as the next one (bos)."""
    idx = torch.randint(MARK, (len(marks), T))
    for row, ends in marks.items():
        for end in ends:
            idx[row, end - 1 if boundary == "eos" else end] = MARK
    return idx


ENDS = {0: [3, 4, 11], 1: [8], 2: []}


def test_conventions() -> None:
    eos = torch.tensor([[5, MARK, 5, MARK, MARK, 5], [MARK, 5, 5, 5, 5, MARK]])
    documents = find_documents(eos, "eos", MARK)
    assert documents.start_BT.tolist() == [[0, 0, 2, 2, 4, 5], [0, 1, 1, 1, 1, 1]]
    assert documents.lengths == (2, 2, 1, 1, 1, 5)
    documents = find_documents(eos, "bos", MARK)
    assert documents.start_BT.tolist() == [[0, 1, 1, 3, 4, 4], [0, 0, 0, 0, 0, 5]]
    assert documents.lengths == (1, 2, 1, 2, 5, 1)
    assert find_documents(eos.as_subclass(PaddedRows), "bos", MARK).lengths == documents.lengths


@given(st.lists(st.lists(st.booleans(), min_size=64, max_size=64), min_size=1, max_size=3), st.integers(1, 64))
def test_offsets_are_the_lengths(marks: list[list[bool]], T: int) -> None:
    # Up to 68 tokens, any number of documents fits.
    first = torch.tensor(marks)[:, :T]
    first[:, 0] = True
    offsets, overflow = document_offsets(first, largest_extent(*first.shape))
    assert offsets.dtype == torch.int32
    assert offsets.numel() == first.numel() + 1
    edges = [*first.flatten().nonzero().flatten().tolist(), first.numel()]
    assert offsets[: len(edges)].tolist() == edges
    assert (offsets[len(edges) :] == first.numel()).all()
    assert overflow == 0


def test_too_many_documents_for_the_offsets_give_nan_and_no_failed_assertion() -> None:
    first = torch.ones(2, 256, dtype=torch.bool)
    offsets, overflow = document_offsets(first, largest_extent(*first.shape))
    assert offsets.numel() == 2 * (16 + 64) + 1
    # The kernel still gets offsets that it can work with.
    assert offsets[-1] == first.numel()
    assert (offsets.diff() > 0).all()
    assert overflow.isnan()
    first[:, 40:] = False
    offsets, overflow = document_offsets(first, largest_extent(*first.shape))
    assert overflow == 0
    assert offsets[:41].tolist() == [*range(40), 256]


ROOM_CASES = st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 5, 128, 129, 300]))


@given(ROOM_CASES, st.sampled_from([0.0, 0.01, 0.4, 1.0]), st.sampled_from(["eos", "bos"]), st.integers(0, 2**16))
def test_exact_room_equals_the_largest(
    shape: tuple[int, int], chance: float, boundary: Literal["eos", "bos"], seed: int
) -> None:
    """Offsets with room for what the host has counted are those of the largest room, without the padding."""
    torch.manual_seed(seed)
    B, T = shape
    ids = torch.where(torch.rand(B, T + 1) < chance, MARK, torch.randint(-1, MARK, (B, T + 1)))
    ids[:, T - T // 4 + 1 :] = PADDING
    idx = ids.as_subclass(PaddedRows).to("cpu")[:, :-1]
    documents = find_documents(idx, boundary, MARK)
    assert documents.lengths is not None
    extent = needed_extent(idx, boundary, MARK)
    assert extent.documents == len(documents.lengths)
    assert max(documents.lengths) <= extent.longest <= min(T, max(documents.lengths) + 127)
    first = documents.start_BT == torch.arange(T)
    offsets, overflow = document_offsets(first, extent)
    assert overflow == 0
    assert offsets.diff().tolist() == list(documents.lengths)
    largest, overflow = document_offsets(first, largest_extent(B, T))
    if overflow == 0:
        assert largest[: offsets.numel()].tolist() == offsets.tolist()
        assert (largest[offsets.numel() :] == idx.numel()).all()
    # Too little room is noticed, too much is not an error.
    longest = max(documents.lengths)
    for room, fits in (
        (Extent(extent.documents - 1, T), False),
        (Extent(extent.documents, longest - 1), False),
        (Extent(extent.documents, longest), True),
        (Extent(extent.documents + 3, T + 5), True),
    ):
        assert document_offsets(first, room)[1].isnan() != fits


def test_room_without_a_host_copy_is_the_largest() -> None:
    idx = torch.zeros(2, 256, dtype=torch.long)
    assert needed_extent(idx, "eos", MARK) == largest_extent(2, 256) == Extent(160, 256)
    idx = torch.zeros(2, 257, dtype=torch.long).as_subclass(Rows).to("cpu")[:, :-1]
    assert needed_extent(idx, "eos", MARK) == Extent(2, 256)
    idx[0, 3] = MARK
    assert needed_extent(idx, "eos", MARK) == largest_extent(2, 256)


def test_overflow_goes_through_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where documents do not fit, the logits are NaN rather than wrong."""
    model = GPT(attention_config(attention_document_boundary="eos", attention_document_token_id=MARK))
    idx = torch.randint(40, (1, 8))
    assert model(idx).isfinite().all()
    original = gpt_forward.find_documents

    def overflowing(*arguments: Any) -> Documents:
        return replace(original(*arguments), overflow=torch.tensor(math.nan))

    monkeypatch.setattr(gpt_forward, "find_documents", overflowing)
    assert model(idx).isnan().all()


@given(
    B=st.integers(1, 3),
    window=st.sampled_from([None, 1, 3, 50]),
    has_sinks=st.booleans(),
    chance=st.sampled_from([0.0, 0.2, 0.9]),
    seed=st.integers(0, 2**16),
)
def test_documents_one_by_one_equal_a_mask(B: int, window: int, has_sinks: bool, chance: float, seed: int) -> None:
    torch.manual_seed(seed)
    q = torch.randn(B, 4, T, 6, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(B, 2, T, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    softmax = Softmax(sinks if has_sinks else None, 0.4)
    documents = find_documents((torch.rand(B, T) < chance).long(), "eos", 1)
    assert documents.lengths is not None
    out = causal_attention(q, k, v, softmax, window, documents)
    expected = causal_attention(q, k, v, softmax, window, Documents(documents.start_BT))
    torch.testing.assert_close(out, expected)
    inputs = [q, k, v, *([sinks] if has_sinks else [])]
    dout = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, inputs, dout), torch.autograd.grad(expected, inputs, dout), rtol=1e-9, atol=1e-11
    )


def test_mask() -> None:
    start = torch.tensor([[0, 0, 2, 2]])
    mask = document_mask(torch.arange(4), start, 4)
    assert mask.shape == (1, 1, 4, 4)
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_every_document_is_as_if_alone(changes: dict[str, Any]) -> None:
    """Where it begins in the sequence, if learned positions do not begin anew."""
    boundary = changes.get("attention_document_boundary", "eos")
    model, idx = make_model(**changes), tokens(ENDS, boundary)
    out = model(idx)
    if changes.get("position_embedding") is None:
        # Rotary attention sees distances only.
        model.config.attention_document_restart_positions = not changes.get("attention_document_restart_positions")
        torch.testing.assert_close(model(idx), out, rtol=1e-5, atol=1e-5)
    counts_on = "position_embedding" in changes and "attention_document_restart_positions" not in changes
    positions = model.transformer.wpe.weight if counts_on else None
    for row, ends in ENDS.items():
        for begin, end in zip([0, *ends], [*ends, T], strict=True):
            if positions is not None:
                model.transformer.wpe.weight = torch.nn.Parameter(positions[begin:])
            alone = model(idx[row : row + 1, begin:end])
            torch.testing.assert_close(out[row : row + 1, begin:end], alone, rtol=1e-5, atol=1e-5)


def test_restarted_positions_are_looked_up_once() -> None:
    model, seen = make_model(attention_document_restart_positions=True), []
    for block in model.transformer.h:
        block.register_forward_pre_hook(lambda block, arguments: seen.append([x.data_ptr() for x in arguments[1:3]]))
    model(tokens(ENDS))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("changes", VARIANTS[:6], ids=str)
def test_nothing_leaks(changes: dict[str, Any]) -> None:
    model, idx = make_model(**changes), tokens({0: [7, 12]}, changes.get("attention_document_boundary", "eos"))
    captured = []
    model.transformer.wte.register_forward_hook(lambda module, args, out: captured.append(out.requires_grad_()))
    out = model(idx)
    other = idx.clone()
    other[0, :6] = (other[0, :6] + 1) % MARK
    assert torch.equal(model(other)[:, 7:], out[:, 7:])
    assert not torch.equal(model(other)[:, :7], out[:, :7])
    (grad,) = torch.autograd.grad(out[:, 7:12].square().sum(), captured[0])
    assert (grad[:, :7] == 0).all()
    assert (grad[:, 12:] == 0).all()
    assert (grad[:, 7:12] != 0).any()


@pytest.mark.parametrize("impl", [CheckpointImpl.REENTRANT, CheckpointImpl.NO_REENTRANT])
@pytest.mark.parametrize("restart", [False, True])
def test_activation_checkpointing_recomputes_each_batch_with_its_own(impl: CheckpointImpl, restart: bool) -> None:
    model = make_model(attention_document_restart_positions=restart, sliding_window_size=5)
    first, second = tokens(ENDS), tokens({0: [10], 1: [2, 5], 2: [1]})
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(first).square().sum(), parameters)
    block = type(model.transformer.h[0])
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=lambda module: checkpoint_wrapper(module, checkpoint_impl=impl),
        check_fn=lambda module: isinstance(module, block),
    )
    out = model(first)
    model(second)  # must not get into the recomputation
    out.square().sum().backward()
    torch.testing.assert_close([parameter.grad for parameter in parameters], list(expected))


# Of a single rotated element LitGPT makes two, so that queries and keys are longer than values.
@pytest.mark.parametrize("changes", [*VARIANTS, {"rotary_percentage": 0.125}], ids=str)
@pytest.mark.parametrize("prompt", [1, 9, 14])
@torch.inference_mode()
def test_cache_equals_full_forward(changes: dict[str, Any], prompt: int) -> None:
    model = make_model(**changes)
    idx = tokens(ENDS, changes.get("attention_document_boundary", "eos"))
    expected = model(idx)
    model.set_kv_cache(3, max_seq_length=T, dtype=torch.float64)
    for chunks in ([prompt, *[1] * (T - prompt)], [prompt, T - prompt]):
        outs = [model(idx[:, chunk], input_pos=chunk) for chunk in torch.arange(T).split(chunks)]
        torch.testing.assert_close(torch.cat(outs, dim=1), expected, rtol=1e-5, atol=1e-5)
    # Going back over a token that ended a document, as speculative decoding does.
    position = torch.arange(8, T)
    changed = idx.clone()
    changed[:, 8:12] = 3
    outs = model(changed[:, 8:], input_pos=position)
    torch.testing.assert_close(outs, model(changed)[:, 8:], rtol=1e-5, atol=1e-5)
    # A position per sequence.
    model(idx, input_pos=torch.arange(T))
    position = torch.tensor([[12], [9], [4]])
    outs = model(idx.gather(1, position), input_pos=position)
    torch.testing.assert_close(outs[:, 0], expected[torch.arange(3), position[:, 0]], rtol=1e-5, atol=1e-5)


def test_a_cache_that_was_first_used_in_inference_mode() -> None:
    model, idx, position = make_model().eval(), tokens(ENDS), torch.arange(T)
    model.set_kv_cache(3, max_seq_length=T, dtype=torch.float64)
    with torch.inference_mode():
        expected = model(idx, position)
    with torch.no_grad():
        assert torch.equal(model(idx, position), expected)


@pytest.mark.slow
def test_compiles_without_graph_breaks() -> None:
    changes = {"attention_document_restart_positions": True, "sliding_window_size": 5, "embedding_dropout": 0.1}
    model = make_model(n_layer=1, **changes).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    parameters = list(model.parameters())
    for idx in (tokens(ENDS), tokens(ENDS)[:, :13], tokens(ENDS).as_subclass(Rows).to("cpu")[:, :9]):
        out, expected = compiled(idx), model(idx)
        torch.testing.assert_close(out, expected)
        dout = torch.randn_like(out)
        torch.testing.assert_close(
            torch.autograd.grad(out, parameters, dout), torch.autograd.grad(expected, parameters, dout)
        )


def test_positions_without_a_cache_are_refused() -> None:
    model, idx = make_model(), torch.zeros(1, T, dtype=torch.long)
    with pytest.raises(TypeError, match=r"call `gpt.set_kv_cache\(\)` first"):
        model(idx, input_pos=torch.arange(T))


def test_meta_device() -> None:
    with torch.device("meta"):
        model = GPT(attention_config(attention_document_boundary="eos", attention_document_token_id=MARK))
        out = model(torch.zeros(2, T, dtype=torch.long))
    out.sum().backward()
    assert out.shape == (2, T, 40)
