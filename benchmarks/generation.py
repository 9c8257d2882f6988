"""Generation at the size of the NanoGPT-MoE model of 134.6M parameters, and of a model that `LLaMAMoE` can express.

    python benchmarks/generation.py                 # about two minutes on two cores
    python benchmarks/generation.py --dtype bfloat16

The size follows from its known properties: 8 experts of which each token visits 2, with ReLU and four times the width,
learned positions for 1080 tokens, a vocabulary of 2048. 30 layers of width 256 with tied embeddings have 134.6M
parameters; with rotary positions and a separate output layer, as here, 134.9M.
"""

import argparse

import torch

import litgpt_moe_ext

litgpt_moe_ext.register()

from litgpt import Config  # noqa: E402

from litgpt_moe_ext.cli.commands.benchmark_generation import print_timings  # noqa: E402
from litgpt_moe_ext.cli.output import progress  # noqa: E402
from litgpt_moe_ext.inspect.generation import Workload, benchmark, contenders, initialized  # noqa: E402
from litgpt_moe_ext.model_size import count_parameters  # noqa: E402

NANOGPT_MOE = {
    "name": "NanoGPT-MoE",
    "block_size": 1080,
    "n_layer": 30,
    "n_embd": 256,
    "n_head": 8,
    "vocab_size": 2048,
    "padded_vocab_size": 2048,
    "norm_class_name": "LayerNorm",
    "bias": False,
    "parallel_residual": False,
    "rotary_percentage": 1.0,
    "mlp_class_name": "NoisyTopKMoE",
    "mlp_activation": "relu",
    "n_expert": 8,
    "n_expert_per_token": 2,
    "moe_intermediate_size": 1024,
}
# The same shape, but with LLaMAMoE's activation.
SWIGLU = {**NANOGPT_MOE, "name": "the same with SwiGLU", "mlp_activation": "swiglu", "n_layer": 10}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--prompt-length", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    workload = Workload((1, 8), arguments.prompt_length, arguments.new_tokens, arguments.rounds)
    for settings in (NANOGPT_MOE, SWIGLU):
        torch.manual_seed(0)
        config = Config(**settings)
        model = initialized(config).to(device=arguments.device, dtype=getattr(torch, arguments.dtype))
        models, reasons = contenders(model)
        with progress(config.name, len(models) * len(workload.batch_sizes) * (workload.rounds + 1)) as advance:
            timings = benchmark(models, workload, advance)
        size = count_parameters(config)
        title = f"{config.name}: {size.total / 1e6:.1f}M parameters, {size.active / 1e6:.1f}M active"
        print_timings(
            timings, f"{title}; {arguments.device}, {arguments.dtype}, {torch.get_num_threads()} threads", workload
        )
        print("\n".join(reasons))


if __name__ == "__main__":
    main()
