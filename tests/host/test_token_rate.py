"""The token rate that LitGPT prints at the end."""

from types import SimpleNamespace

from litgpt_moe_ext.host import token_rate


def test_rate_is_tokens_by_seconds_of_this_run(monkeypatch):
    """100 iterations of 2 x 8 tokens on 3 processes in 4 s, resumed at iteration 50."""
    clock = iter((10.0, 14.0))
    monkeypatch.setattr(token_rate.time, "perf_counter", lambda: next(clock))
    said = []
    model = SimpleNamespace(max_seq_length=8)
    state = {"iter_num": 50, "model": model}

    def fit(fabric, state, train):
        state["iter_num"] += 100

    pretrain = SimpleNamespace(fit=fit)

    def main(fabric, train):
        pretrain.fit(fabric, state, train=train)  # names are optional
        fabric.print("| - Training Time : 1 s")
        fabric.print("| - Tok/sec       : 0.05 tok/s")

    pretrain.main = main
    token_rate.measure_rate(pretrain)
    token_rate.print_rate(pretrain)

    class Fabric(SimpleNamespace):
        def print(self, text):
            said.append(text)

    pretrain.main(Fabric(world_size=3), train=SimpleNamespace(micro_batch_size=2))
    assert said == ["| - Training Time : 1 s", "| - Tok/sec       : 1200.00 tok/s"]
