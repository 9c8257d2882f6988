"""The hash and the uniform router: deterministic where they must be, and even."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from lightning.fabric.plugins import HalfPrecision
from litgpt import GPT

from litgpt_moe_ext.moe.balancing.metrics import load_metrics
from litgpt_moe_ext.moe.batch_metadata import TokenIds
from litgpt_moe_ext.moe.layer import SharedExpertMoE
from litgpt_moe_ext.moe.routing.fixed_routers import HashRouter, UniformRouter
from litgpt_moe_ext.training.callbacks.activation_checkpointing import ActivationCheckpointing
from tests.models import initialized_model, moe_config, randomize
from tests.runs import PATIENCE


def make(cls, **settings):
    return cls(moe_config(router_type="hash" if cls is HashRouter else "uniform", **settings))


def test_a_token_id_always_visits_the_same_experts():
    ids = torch.tensor([5, 9, 5, 5, 9])
    router, x = make(HashRouter), torch.randn(5, 16)
    router(x, ids=TokenIds(ids.flip(0) + 1))
    routing = router(x, ids=TokenIds(ids))
    rows = [set(row.tolist()) for row in routing.experts_TK]
    assert rows[0] == rows[2] == rows[3]
    assert rows[1] == rows[4]
    assert all(len(row) == 2 for row in rows)
    assert (routing.weights_TK == 0.5).all()
    assert torch.equal(routing.experts_TK, make(HashRouter)(x, ids=TokenIds(ids)).experts_TK)


def murmur_hash_3(key):
    """Its finaliser in Python's integers, as a signed number of 64 bits."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        key = (key ^ key >> 33) * factor % 2**64
    key ^= key >> 33
    return key - 2**64 if key >> 63 else key


@pytest.mark.parametrize("n_expert", [3, 8])
def test_a_trained_model_finds_its_experts_in_every_version(n_expert):
    ids = [0, 1, 7, 4095, 50256, 151935]
    hashes = [[murmur_hash_3(token * n_expert + expert) for expert in range(n_expert)] for token in ids]
    chosen = make(HashRouter, n_expert=n_expert)(torch.randn(6, 16), ids=TokenIds(torch.tensor(ids))).experts_TK
    best = [sorted(range(n_expert), key=row.__getitem__)[-2:] for row in hashes]
    assert [sorted(row) for row in chosen.tolist()] == [sorted(row) for row in best]
    assert TokenIds(torch.tensor(ids)).hashes(n_expert).tolist() == hashes


@pytest.mark.parametrize("n_expert", [3, 8, 64])
def test_hashing_is_even(n_expert):
    """50257 ids over E experts: every count within five standard deviations of the mean."""
    ids = TokenIds(torch.arange(50257))
    routing = make(HashRouter, n_expert=n_expert)(torch.randn(50257, 16), ids=ids)
    mean = 50257 * 2 / n_expert
    assert (routing.counts_E - mean).abs().max() < 5 * mean**0.5
    pairs = routing.experts_TK.sort(1).values
    assert len(pairs.unique(dim=0)) == n_expert * (n_expert - 1) // 2
    hashes = ids.hashes(n_expert)[:999]
    assert hashes.unique().numel() == 999 * n_expert, "no id repeats those of its neighbour"


def test_uniform_in_training_and_fixed_in_evaluation():
    ids, x = TokenIds(torch.arange(4000)), torch.randn(4000, 16)
    router = make(UniformRouter)
    first, second = router(x), router(x)
    assert not torch.equal(first.experts_TK, second.experts_TK)
    assert (first.counts_E - 1000).abs().max() < 5 * 1000**0.5
    router.eval()
    assert torch.equal(router(x, ids=ids).experts_TK, router(x, ids=ids).experts_TK)


@pytest.mark.parametrize("router_type", ["hash", "uniform"])
def test_a_model_shows_its_routers_the_token_ids(router_type):
    model = initialized_model(moe_config(router_type=router_type))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randint(0, 64, (2, 32))).sum().backward()
    optimizer.step()
    metrics = load_metrics(model)
    assert metrics["moe/max_vio"] > 0.0
    assert "moe/router_entropy" not in metrics
    model.eval()
    ids = torch.randint(0, 64, (1, 9))
    whole = model(ids)
    model.set_kv_cache(batch_size=1)
    steps = [model(ids[:, i : i + 1], torch.tensor([i])) for i in range(9)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_a_model_shows_its_own_routers_the_token_ids(duplicate):
    config = moe_config(router_type="hash")
    model = GPT(config).eval()
    model.load_state_dict(initialized_model(config).state_dict())
    before, ids = torch.randint(0, 64, (2, 2, 32))
    model(before)
    other = duplicate(model)
    assert torch.equal(other(ids), model(ids))


def gradients(model, forward, *batches):
    """Return those of a loss of several batches, which go backward together."""
    model.zero_grad()
    sum(forward(ids).square().sum() for ids in batches).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_recomputation_takes_the_ids_of_its_own_forward_pass():
    model = randomize(initialized_model(moe_config(router_type="hash")), 0.3).double()
    batches = torch.randint(0, 64, (2, 2, 9))
    expected = gradients(model, model, *batches)
    ActivationCheckpointing("full").on_before_setup(model)
    torch.testing.assert_close(gradients(model, model, *batches), expected)


def test_draws_do_not_depend_on_the_precision_of_the_model():
    """With `bf16-true`, torch's default dtype is bfloat16 in a forward pass, but not in its recomputation."""
    model = randomize(initialized_model(moe_config(router_type="uniform")), 0.3).bfloat16()
    precision, ids = HalfPrecision("bf16-true"), torch.randint(0, 64, (2, 32))

    def forward(ids):
        torch.manual_seed(0)
        with precision.forward_context():
            return model(ids)

    expected = gradients(model, forward, ids)
    ActivationCheckpointing("full").on_before_setup(model)
    torch.testing.assert_close(gradients(model, forward, ids), expected)
    router = make(UniformRouter)
    with precision.forward_context():
        assert len(router.rank(torch.randn(1000, 16), None).unique()) > 7900


def test_two_threads_use_one_model():
    model = randomize(initialized_model(moe_config(router_type="hash")), 0.3).eval()
    batches = torch.randint(0, 64, (2, 2, 9))
    expected = [model(ids) for ids in batches]
    both_are_inside = threading.Barrier(2, timeout=PATIENCE)

    def wait(*_):
        both_are_inside.wait()

    model.transformer.h[0].register_forward_pre_hook(wait)
    with ThreadPoolExecutor(2) as threads:
        torch.testing.assert_close(list(threads.map(model, batches)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", [False, True])
def test_compiled(checkpoints):
    model = randomize(initialized_model(moe_config(router_type="hash")), 0.3)
    batches = torch.randint(0, 64, (2, 2, 9))
    expected = gradients(model, model, *batches)
    if checkpoints:
        ActivationCheckpointing("full").on_before_setup(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(model, compiled, *batches), expected, rtol=1e-4, atol=1e-5)


def test_a_layer_alone_says_what_is_missing():
    moe = SharedExpertMoE(moe_config(router_type="hash"))
    with pytest.raises(ValueError, match="needs the ids of the 3 tokens; call the whole model"):
        moe(torch.randn(1, 3, 16))
    with pytest.raises(ValueError, match="needs the ids of the 3 tokens"):
        moe(torch.randn(1, 3, 16), ids=TokenIds(torch.arange(4)))
