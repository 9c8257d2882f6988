"""The token rate that LitGPT prints at the end."""

import re
import time
from types import SimpleNamespace

from litgpt_moe_ext.host import token_rate


def test_rate_is_tokens_by_seconds_of_this_run():
    """100 iterations of 2 x 8 tokens on 3 processes in (at least) 0.05 s, resumed at iteration 50."""
    said = []
    model = SimpleNamespace(max_seq_length=8)
    state = {"iter_num": 50, "model": model}

    def fit(fabric, state, train):
        time.sleep(0.05)
        state["iter_num"] += 100

    pretrain = SimpleNamespace(fit=fit)

    def main(fabric, train):
        pretrain.fit(fabric=fabric, state=state, train=train)
        fabric.print("| - Training Time : 1 s")
        fabric.print("| - Tok/sec       : 0.05 tok/s")

    pretrain.main = main
    token_rate.measure_rate(pretrain)
    token_rate.print_rate(pretrain)

    class Fabric(SimpleNamespace):
        def print(self, text):
            said.append(text)

    pretrain.main(Fabric(world_size=3), train=SimpleNamespace(micro_batch_size=2))
    assert said[0] == "| - Training Time : 1 s"
    rate = float(re.fullmatch(r"\| - Tok/sec       : ([\d.]+) tok/s", said[1])[1])
    # The other direction, a lower bound, would be a bet on the speed of the machine.
    assert 0 < rate <= 4800 / 0.05
