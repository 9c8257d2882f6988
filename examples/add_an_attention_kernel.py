"""Add an attention kernel to litgpt_moe_ext, without editing the package.

    python examples/add_an_attention_kernel.py

The kernel here computes attention in blocks of queries, so that scores of a block only are in memory at once. It needs
two functions: `forward` returns the output and the log-sum-exp of the scores, and `backward` recomputes probabilities
from the log-sum-exp it is given. Sinks, autocast, sliding windows and documents come from the package.
"""

import math

import torch
from litgpt import GPT, Config
from torch import Tensor

import litgpt_moe_ext
from litgpt_moe_ext.attention.kernels.calls import Call, Inputs, Result
from litgpt_moe_ext.extend import AttentionKernel, register_kernel

BLOCK = 16


def scores_of(q_BHTd: Tensor, k_BHSd: Tensor, begin: int, inputs: Inputs, call: Call) -> Tensor:
    """Return the scaled scores of queries that begin at a position; -inf where a query may not look."""
    scores_BHTS = q_BHTd @ k_BHSd.mT * call.scale
    if call.causal:
        query_T = torch.arange(begin, begin + q_BHTd.size(2), device=q_BHTd.device)
        future_TS = torch.arange(k_BHSd.size(2), device=q_BHTd.device) > query_T[:, None]
        scores_BHTS = scores_BHTS.masked_fill(future_TS, -math.inf)
    if inputs.mask is not None:
        T = inputs.q_BHTd.size(2)
        mask = inputs.mask.expand(*inputs.mask.shape[:-2], T, k_BHSd.size(2))
        scores_BHTS = scores_BHTS + mask[..., begin : begin + q_BHTd.size(2), :]
    return scores_BHTS


class Blockwise:
    """The pair of functions that `AttentionKernel.functions` asks for; a module with them would do as well."""

    @staticmethod
    def forward(inputs: Inputs, call: Call) -> Result:
        """Compute the output and the log-sum-exp of the scores."""
        q, k, v = inputs.q_BHTd, *repeat(inputs)
        outs, lses = [], []
        for begin in range(0, q.size(2), BLOCK):
            scores_BHTS = scores_of(q[:, :, begin : begin + BLOCK], k, begin, inputs, call)
            outs.append(scores_BHTS.softmax(-1).nan_to_num() @ v)
            lses.append(scores_BHTS.logsumexp(-1))
        return Result(torch.cat(outs, dim=2), torch.cat(lses, dim=2))

    @staticmethod
    def backward(dout: Tensor, inputs: Inputs, result: Result, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the gradients of queries, keys and values."""
        q, k, v = inputs.q_BHTd, *repeat(inputs)
        dqs, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
        for begin in range(0, q.size(2), BLOCK):
            block = slice(begin, begin + BLOCK)
            scores_BHTS = scores_of(q[:, :, block], k, begin, inputs, call)
            share_BHTS = (scores_BHTS - result.lse_BHT[:, :, block, None]).exp().nan_to_num()
            row_BHT1 = (dout[:, :, block] * result.out_BHTd[:, :, block]).sum(-1, keepdim=True)
            dscores_BHTS = share_BHTS * (dout[:, :, block] @ v.mT - row_BHT1) * call.scale
            dqs.append(dscores_BHTS @ k)
            dk += dscores_BHTS.mT @ q[:, :, block]
            dv += share_BHTS.mT @ dout[:, :, block]
        groups = inputs.k_BGSd.size(1)
        return torch.cat(dqs, dim=2), *(x.unflatten(1, (groups, -1)).sum(2) for x in (dk, dv))


def repeat(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return keys and values repeated for every query head."""
    n = inputs.q_BHTd.size(1) // inputs.k_BGSd.size(1)
    return inputs.k_BGSd.repeat_interleave(n, dim=1), inputs.v_BGSd.repeat_interleave(n, dim=1)


def register() -> None:
    """Make the kernel known; `attention_backend: blockwise` can then name it."""
    register_kernel(
        AttentionKernel(
            name="blockwise",
            summary="attention in blocks of queries",
            functions=Blockwise,
            device="cpu",
            dtypes={"float32": (0, 0), "float64": (0, 0)},
            abilities=frozenset({"mask", "gradient"}),
            # Only where `attention_backend` names it; leave this out, and it is chosen wherever it works.
            automatic=False,
        )
    )


def main() -> None:
    """Compare a model that uses the kernel with one that uses the package's own."""
    litgpt_moe_ext.register()
    register()
    settings = {
        "n_layer": 2, "n_head": 4, "n_query_groups": 2, "n_embd": 32, "block_size": 64, "padded_vocab_size": 100,
        "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "intermediate_size": 64,
        "attention_class_name": "SinkAttention", "sliding_window_size": 20, "sliding_window_indices": [0, 1],
    }  # fmt: skip
    torch.manual_seed(0)
    ours = GPT(Config(**settings))
    theirs = GPT(Config(**settings, attention_backend="blockwise"))
    theirs.load_state_dict(ours.state_dict())
    idx_BT = torch.randint(100, (2, 50))
    losses = []
    for model in (ours, theirs):
        loss = torch.nn.functional.cross_entropy(model(idx_BT)[:, :-1].flatten(0, 1), idx_BT[:, 1:].flatten())
        loss.backward()
        losses.append(loss)
    torch.testing.assert_close(losses[1], losses[0])
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(other.grad, mine.grad)
    print(f"loss and all gradients are equal: {losses[1].item():.4f}, kernel {theirs.config.attention_backend}")


if __name__ == "__main__":
    main()
