"""The token rate that LitGPT prints at the end of a run.

LitGPT 0.5.13 divides the number of tokens by `train_time`, which at that point is still a reading of the clock and not
a duration (`litgpt/pretrain.py`, end of `main`); on a machine that has been up for a day it prints 56 tokens a second
instead of 6000. It also counts the tokens of the earlier runs of a resumed training. Here the tokens and the time of
this run's training loop are measured and the printed line is corrected.
"""

import inspect
import time
from typing import Any

from litgpt_moe_ext.host.replaced import wrapping

_LINE = "| - Tok/sec"


def measure_rate(pretrain: Any) -> None:
    """Let `fit` of the module `litgpt.pretrain` leave its rate, in tokens per second, on the fabric."""

    @wrapping(pretrain, "fit")
    def fit(original: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(original).bind(*args, **kwargs).arguments
        fabric, state, train = given["fabric"], given["state"], given["train"]
        first_iter, started = state["iter_num"], time.perf_counter()
        result = original(*args, **kwargs)
        iterations = state["iter_num"] - first_iter
        tokens = iterations * train.micro_batch_size * state["model"].max_seq_length * fabric.world_size
        fabric.tokens_per_second = tokens / (time.perf_counter() - started)
        return result


def print_rate(pretrain: Any) -> None:
    """Let `main` of the module `litgpt.pretrain` print that rate instead of its own."""

    @wrapping(pretrain, "main")
    def main(original: Any, fabric: Any, *args: Any, **kwargs: Any) -> Any:
        original_print = fabric.print

        def print_corrected(*values: Any, **options: Any) -> None:
            rate = getattr(fabric, "tokens_per_second", None)
            if values and str(values[0]).startswith(_LINE) and rate is not None:
                values = (f"{_LINE}       : {rate:.2f} tok/s",)
            original_print(*values, **options)

        fabric.print = print_corrected
        try:
            return original(fabric, *args, **kwargs)
        finally:
            del fabric.print
