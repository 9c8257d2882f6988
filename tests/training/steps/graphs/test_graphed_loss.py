"""A loss whose passes are captured and replayed trains as the loss itself does."""

from functools import partial

import pytest
import torch
from torch import nn

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.moe.balancing.metrics import routers_of
from litgpt_moe_ext.moe.kernels.operators import parts
from litgpt_moe_ext.moe.kernels.step_weights import StepWeights, cast
from litgpt_moe_ext.tokens import padding
from litgpt_moe_ext.training.optim.gpu_step import GpuStep
from litgpt_moe_ext.training.steps.graphs.capture import Passes
from litgpt_moe_ext.training.steps.graphs.check import Reference
from litgpt_moe_ext.training.steps.graphs.gradient_tasks import GradientTask, run_now
from litgpt_moe_ext.training.steps.graphs.graphed_loss import GraphedLoss, GraphOptions
from tests.models import initialized_model, moe_config
from tests.subsets import soon
from tests.training.steps.graphs.passes import Recordings, Reruns

VOCABULARY = 64


@pytest.fixture(autouse=True)
def _no_padding(monkeypatch):
    # An earlier run of the process may have accepted it, and on a CPU padding is looked for, which is a wait.
    monkeypatch.setattr(padding, "_accepted", False)


def make_model(**changes):
    torch.manual_seed(0)
    settings = {"router_bias_update_rate": 0.01, "router_z_loss_coef": 0.01, "expert_dropout": 0.1}
    return initialized_model(moe_config(padded_vocab_size=VOCABULARY, **(settings | changes)))


def batches(number, rows=2, length=16):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, VOCABULARY, (rows, length + 1), generator=generator) for _ in range(number)]


class Training:
    def __init__(self, graphs: bool, shape=None, dtype=None, **options):
        self.model, self.said, self.dtype = make_model(**shape or {}), [], dtype
        self.captures = []
        self.loss, run_task = self.plain_loss, run_now
        if graphs:
            how = GraphOptions(**{"careful": True, "make_capture": self._make} | options)
            self.loss = GraphedLoss(self.plain_loss, self.model, self.said.append, how)
            run_task = self.loss.run_task
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, fused=True)
        GpuStep(self.optimizer, run_task).install()
        clip = partial(nn.utils.clip_grad_norm_, list(self.model.parameters()), 1.0)
        self.clip = partial(run_task, GradientTask("clipping", clip, tuple))
        torch.manual_seed(1)

    def _make(self):
        self.captures.append(Reruns())
        return self.captures[-1]

    def plain_loss(self, ids, targets):
        with torch.autocast("cpu", self.dtype, enabled=self.dtype is not None):
            return nn.functional.cross_entropy(self.model(ids).flatten(0, 1), targets.flatten())

    def step(self, micro_batches, zero_grad=True):
        losses = []
        for i, batch in enumerate(micro_batches):
            loss = self.loss(batch[:, :-1], batch[:, 1:])
            # Another scale for each, as batches with padding have.
            (loss * (i + 1) / len(micro_batches)).backward()
            losses.append(loss.detach())
        norm = self.clip()
        # As LitGPT's loop does; a graph must not repeat the rate of its capture.
        self.optimizer.param_groups[0]["lr"] *= 0.9
        self.optimizer.step()
        if zero_grad:
            self.optimizer.zero_grad()
        return [*(loss.item() for loss in losses), norm.item()]

    def state(self):
        loads = {name: router.record for name, router in routers_of(self.model).items()}
        return dict(self.model.state_dict()) | loads


def assert_trains_alike(train, shape=None, dtype=None, **options):
    """Check that `train`, given a training, does the same with passes that are replayed; return that training."""
    graphed = Training(True, shape, dtype, **options)
    numbers = train(graphed)
    plain = Training(False, shape, dtype)
    assert train(plain) == numbers
    ours, theirs = graphed.state(), plain.state()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    return graphed


@pytest.mark.parametrize("accumulation", [1, 3])
def test_equals_the_loss_itself(accumulation):
    data = batches(7 * accumulation)

    def train(training):
        return [training.step(data[i : i + accumulation]) for i in range(0, len(data), accumulation)]

    graphed = assert_trains_alike(train)
    assert graphed.said == ["CUDA graphs: on, from this step"]
    assert [capture.captured for capture in graphed.captures] == [min(accumulation, 2)]


GLOBAL = {"router_load_balancing_loss_coef": 1.0, "router_load_balancing_loss_scope": "global_batch"}
GROUPED = {"expert_backend": "grouped_mm", "moe_intermediate_size": 16}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_experts_weights_are_shared(monkeypatch, dtype):
    """Casts and sums of gradients, also in steps that begin with another shape, and where something has moved."""
    small, other = batches(20), batches(2, rows=1, length=9)
    casts, sums = [], []
    cast, extend = StepWeights.cast, parts._sum_outer_products
    monkeypatch.setattr(StepWeights, "cast", lambda self, *of: casts.append(of[1]) or cast(self, *of))
    monkeypatch.setattr(parts, "_sum_outer_products", lambda call, to: sums.append(to) or extend(call, to))

    def train(training):
        numbers = [training.step(small[i : i + 2]) for i in range(0, 8, 2)]
        numbers.append(training.step([other[0], *small[8:10]]))
        training.model.cos = training.model.cos.clone()
        numbers += [training.step(small[i : i + 3]) for i in range(10, 16, 3)]
        training.model.transformer.h[0].mlp.experts.down_proj.grad = torch.ones(8, 16, 16)
        return [*numbers, training.step(small[16:18])]

    graphed = assert_trains_alike(train, GROUPED, dtype)
    assert [capture.captured for capture in graphed.captures] == [2, 2]
    assert bool(casts) == (dtype is not None)
    assert any(total is not None for total in sums)
    kept = graphed.loss._weights._casts
    assert len(kept) == (4 if dtype else 0)
    sums.clear()
    assert_trains_alike(train, GROUPED, dtype, sharing=False)
    assert not any(total is not None for total in sums)


def test_frozen_experts_that_change_between_steps_are_cast_anew():
    """Nothing but the step says that something may have changed them, such as a callback."""

    def train(training):
        experts = [block.mlp.experts for block in training.model.transformer.h]
        numbers = []
        for i in range(0, 10, 2):
            for parameter in (parameter for module in experts for parameter in module.parameters()):
                parameter.requires_grad_(False).data.mul_(1.1)
            numbers.append(training.step(batches(10)[i : i + 2]))
        return numbers

    graphed = assert_trains_alike(train, GROUPED, torch.bfloat16)
    assert len(graphed.loss._weights._casts) == 4


@pytest.mark.parametrize("frozen", [False, True])
def test_casts_that_are_kept_are_those_of_the_weights(frozen):
    """From the first use, also of weights that have no gradient to say that a step has begun."""
    weight, weights = nn.Parameter(torch.full((2, 2), 3.0), requires_grad=not frozen), StepWeights()
    with weights.shared():
        assert torch.equal(cast(weight, torch.bfloat16), weight.bfloat16())
        weights.refresh()
        weights.keep()
        weights.refresh()
        assert cast(weight, torch.bfloat16) is cast(weight, torch.bfloat16)
        assert torch.equal(cast(weight, torch.bfloat16), weight.bfloat16())
        with torch.no_grad():
            weight.data.mul_(2)  # of which a version knows nothing
        weights.expire()
        weights.refresh()
        assert torch.equal(cast(weight, torch.bfloat16), weight.bfloat16())


SINKS = {"attention_class_name": "SinkAttention", "attention_dropout": 0.1, "residual_dropout": 0.1}
STILL = {"router_bias_update_rate": None}
KINDS = {
    "top k": {
        **SINKS, "embedding_dropout": 0.1, "router_jitter_noise": 0.1, "router_sequence_balancing_loss_coef": 0.1,
        "n_shared_expert": 1, "router_bias_update_schedule": {"warmup_steps": 4, "decay_start": 3, "decay_steps": 3},
    },
    "global batch": GLOBAL,
    "groups": {
        "router_score_function": "sigmoid", "n_expert_groups": 4, "n_topk_groups": 2, "n_topk_scores_per_group": 1,
        "router_load_balancing_loss_coef": 0.1, "router_orthogonality_loss_coef": 0.1, "mlp_activation": "relu2",
    },
    "noisy": {
        **SINKS, **STILL, "router_type": "noisy_topk", "router_importance_loss_coef": 0.1, "router_load_loss_coef": 0.1,
        "sliding_window_size": 5, "bias": True,
    },
    "hash": {
        **STILL, "router_type": "hash", "router_z_loss_coef": None, "shared_expert_gate": True, "n_shared_expert": 1,
    },
    "uniform": {**STILL, "router_type": "uniform", "router_z_loss_coef": None, "expert_gate_on_input": True},
}  # fmt: skip


@pytest.mark.parametrize("padded", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["padded", "full"])
@pytest.mark.parametrize("kind", [*KINDS][:2] + [pytest.param(kind, marks=pytest.mark.slow) for kind in [*KINDS][2:]])
def test_nothing_of_python_is_in_a_replay(monkeypatch, kind, padded):
    """The replays are those of a recording, which knows neither Python's numbers nor its branches."""
    data = batches(10)
    monkeypatch.setattr(padding, "_accepted", padded)
    if padded:
        # As on a device, where nobody looks whether there is padding.
        monkeypatch.setattr("litgpt_moe_ext.attention.gpt_forward.real_tokens", lambda ids: ids >= 0)
        for i, batch in enumerate(data):
            batch[i % 2, 16 - i % 5 :] = padding.PADDING

    def train(training):
        return [training.step(data[i : i + 2]) for i in range(0, 10, 2)]

    graphed = assert_trains_alike(train, GROUPED | KINDS[kind], torch.bfloat16, make_capture=Recordings)
    assert graphed.said == ["CUDA graphs: on, from this step"]


def test_casts_are_not_kept_where_memory_is_short(monkeypatch):
    lacks = iter([None, "with them 7.0 GiB would be needed, 5.0 are there"])
    asked = []
    place = "litgpt_moe_ext.training.steps.graphs.graphed_loss.lack_of_memory"
    monkeypatch.setattr(place, lambda device, more=0: asked.append(more) or next(lacks))
    data = batches(8)

    def train(training):
        return [training.step(data[i : i + 2]) for i in range(0, 8, 2)]

    graphed = assert_trains_alike(train, GROUPED, torch.bfloat16)
    assert graphed.said == [
        "CUDA graphs: on, from this step; casts of the experts' weights are not kept: with them 7.0 GiB would be "
        "needed, 5.0 are there"
    ]
    assert asked == [0, 2 * 2 * 8 * (32 * 16 + 16 * 16)]  # two layers, two bytes
    assert not graphed.loss._weights._casts


@pytest.mark.parametrize("shape", [{}, GLOBAL], ids=["plain", "global batch"])
def test_batches_of_another_shape_and_gradients_of_others(shape):
    small, other = batches(12), batches(2, rows=1, length=9)

    def train(training):
        for i in range(3):
            training.step(small[i : i + 1])
        training.step([small[3], other[0], small[4]])
        training.step([other[1], small[5]])
        # A leaf that already has a gradient, and one that has lost it.
        training.model.lm_head.weight.grad = torch.ones_like(training.model.lm_head.weight)
        training.step(small[6:8])
        training.loss(small[8][:, :-1], small[8][:, 1:]).backward()
        training.model.lm_head.weight.grad = None
        return training.step(small[9:10])

    assert len(assert_trains_alike(train, shape).captures) == 1


def test_casts_are_new_in_a_step_that_begins_with_a_gradient_and_another_shape():
    small, other = batches(6), batches(1, rows=1, length=9)

    def train(training):
        for batch in small[:5]:
            training.step([batch])
        training.model.lm_head.weight.grad = torch.ones_like(training.model.lm_head.weight)
        return training.step([other[0], small[5]])

    assert_trains_alike(train, GROUPED, torch.bfloat16)


def test_forward_passes_of_others_count_once():
    """As without graphs: in the step that follows, not in every step after a capture."""
    data = batches(14)

    def train(training):
        numbers = []
        for i in range(0, 14, 2):
            if i in (4, 8):
                with torch.no_grad():
                    training.model(data[0][:, :-1])
            numbers.append(training.step(data[i : i + 2]))
        return numbers

    graphed = assert_trains_alike(train, GROUPED | GLOBAL, torch.bfloat16, make_capture=Recordings)
    assert graphed.said == ["CUDA graphs: on, from this step"]


def test_a_step_that_is_left_out():
    data = batches(8)

    def train(training):
        for batch in data[:4]:
            training.step([batch])
        training.loss(data[4][:, :-1], data[4][:, 1:]).backward()
        training.optimizer.zero_grad()
        [router.tally.take() for router in routers_of(training.model).values()]
        return [training.step([batch]) for batch in data[5:]]

    assert_trains_alike(train)


def test_captures_again_when_a_tensor_has_moved():
    data = batches(8)

    def train(training):
        for batch in data[:4]:
            training.step([batch])
        training.model.cos = training.model.cos.clone()
        for batch in data[4:6]:
            training.step([batch])
        head = training.model.lm_head.weight
        head.data = head.data.clone()
        return [training.step([batch]) for batch in data[6:]]

    graphed = assert_trains_alike(train)
    assert len(graphed.captures) == 3
    assert len(graphed.said) == 1


class RoomForIds:
    """As if passes had to know how large an id may be."""

    def __init__(self):
        self.reserved = []

    def needed(self, ids):
        return (int(ids.max()) // 16,)

    def reserve(self, ids, sizes):
        self.reserved.append((ids, sizes))

    def require(self, ids):
        for static, sizes in self.reserved:
            if static is ids:
                assert self.needed(ids) <= sizes


def test_captures_again_for_what_needs_more_room():
    """At the next step; what does not fit before it runs as it is, and room does not shrink."""
    low, high = ([batch % limit for batch in batches(10)] for limit in (32, VOCABULARY))
    low, high = [batch.clamp_(min=16) for batch in low], high
    assert {int(batch[:, :-1].max()) // 16 for batch in low} == {1}
    assert {int(batch[:, :-1].max()) // 16 for batch in high} == {3}
    room, counts = RoomForIds(), []

    def train(training):
        if training.loss is not training.plain_loss and isinstance(training.loss, GraphedLoss):
            loss = training.loss._loss
            training.loss._loss = lambda ids, targets: room.require(ids) or loss(ids, targets)
        found = []
        for micro_batches in (
            *([batch, batch] for batch in low[:4]),
            [low[4], high[0]],  # too large within a step
            [low[5], low[6]],  # captures for it all the same
            [high[1], high[2]],
            [batches(1, rows=1, length=9)[0] % 16, low[7]],  # of another shape, which needs less
            [low[8], low[9]],
        ):
            found.append(training.step(micro_batches))
            counts.append(len(training.captures))
        return found

    graphed = assert_trains_alike(train, dynamic_sizes=room)
    assert counts[: len(counts) // 2] == [0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert [sizes for _, sizes in room.reserved] == [(1,), (3,)]
    assert graphed.said == ["CUDA graphs: on, from this step"]


class OutOfResources(Exception):
    """As Triton's, which is no RuntimeError."""


def failing(error, good):
    """Return what makes passes, but fails after `good` of them."""

    class Fails(Reruns):
        def passes(self, *arguments, **options):
            if self.captured < good:
                return super().passes(*arguments, **options)
            raise error

    return Fails


BROKEN_OFF = RuntimeError("not permitted when stream is capturing\nmore")


@pytest.mark.parametrize(
    ("good", "lengths", "error", "reason"),
    [
        (0, (2, 2, 2), OutOfResources("shared memory"), "OutOfResources: shared memory"),
        (1, (2, 2, 2), BROKEN_OFF, "not permitted when stream is capturing"),
        (1, (1, 1, 1, 2), BROKEN_OFF, "not permitted when stream is capturing"),
    ],
    ids=["first", "other", "within a step"],
)
def test_does_without_where_capturing_fails(good, lengths, error, reason):
    data = batches(6)

    def train(training):
        return [training.step(data[sum(lengths[:i]) :][:length]) for i, length in enumerate(lengths)]

    graphed = assert_trains_alike(train, GROUPED, torch.bfloat16, make_capture=failing(error, good))
    off = f"CUDA graphs: off (capturing failed: {reason})"
    assert graphed.said == ([off] if lengths[1] == 2 else ["CUDA graphs: on, from this step", off])
    assert not graphed.loss._weights._casts
    with pytest.raises(SettingsError, match="cuda_graphs: true cannot work here .capturing failed: "):
        train(Training(True, careful=False, make_capture=failing(error, good)))


@pytest.mark.parametrize(
    ("other", "wrong", "said"),
    [
        (False, "loss", "the loss is"),
        (False, "lm_head.weight", "the gradient of lm_head.weight has the norm"),
        (False, "counts", "the gradient of a router's counts has the norm"),
        (True, "transformer.h.0.mlp.gate.weight", "the gradient of transformer.h.0.mlp.gate.weight has the norm"),
    ],
    ids=["loss", "gradient", "counts", "gradient that is added"],
)
def test_does_without_where_a_replay_differs(other, wrong, said):
    data = batches(6)

    class Differs(Reruns):
        def passes(self, loss, ids, targets, add):
            passes = super().passes(loss, ids, targets, add)

            def forward():
                passes.forward()
                if wrong == "loss":
                    passes.loss.mul_(1.1)

            def backward():
                passes.backward()
                for leaf, gradient in passes.gradients.items():
                    if leaf is named.get(wrong) or (wrong == "counts" and not isinstance(leaf, nn.Parameter)):
                        gradient.mul_(1.1)

            return passes._replace(forward=forward, backward=backward) if add == other else passes

    def train(training):
        named.update(training.model.named_parameters())
        return [training.step(data[i : i + 2]) for i in (0, 2, 4)]

    named = {}
    graphed = assert_trains_alike(train, GROUPED, torch.bfloat16, make_capture=Differs)
    (line,) = graphed.said
    assert line.startswith(f"CUDA graphs: off (replayed, {said} ")
    assert ", and without graphs " in line


def captured_tasks(training):
    return set(training.loss._graphs.tasks._captured)


def changing(kind):
    """Return a function that changes, before a step, what a graph of the optimizer would repeat."""

    def change(training, step):
        (group,) = training.optimizer.param_groups
        if kind == "a setting" and step == 5:
            group["weight_decay"] = 0.5
        if kind == "a setting in every step":
            group["weight_decay"] = 0.1 * step
        if kind == "states" and step == 5:
            training.optimizer.state.clear()
        if kind == "loaded states" and step == 5:
            training.optimizer.load_state_dict(training.optimizer.state_dict())

    return change


@pytest.mark.parametrize("kind", ["nothing", "a setting", "a setting in every step", "states", "loaded states"])
@pytest.mark.parametrize("accumulation", soon([1, 2], [2]))
def test_what_follows_the_passes_is_a_graph_as_well(kind, accumulation):
    """As long as it would be the same again."""
    data, change, captured = batches(10 * accumulation), changing(kind), []

    def train(training):
        numbers = []
        for i in range(10):
            change(training, i)
            numbers += training.step(data[i * accumulation : (i + 1) * accumulation])
            if training.captures:
                captured.append(captured_tasks(training))
        return numbers

    assert_trains_alike(train, GROUPED, torch.bfloat16)
    both = {"clipping", "the optimizer"}
    assert captured[:2] == [set(), {"clipping"} if kind == "a setting in every step" else both]
    assert captured[-1] == captured[1]


def test_a_step_that_is_skipped_changes_nothing():
    """Without gradients, as after one that is not finite, nothing may be repeated."""
    data = batches(8)

    def train(training):
        clip, numbers = training.clip, []

        def clip_and_skip():
            norm = clip()
            training.optimizer.zero_grad()
            return norm

        for i in range(8):
            training.clip = clip_and_skip if i in (5, 6) else clip
            numbers += training.step(data[i : i + 1])
        return numbers

    graphed = assert_trains_alike(train, GROUPED, torch.bfloat16)
    assert captured_tasks(graphed) == {"clipping", "the optimizer"}


@pytest.mark.parametrize("careful", [True, False])
def test_what_follows_may_be_no_graph(careful):
    """The passes stay graphs, also where they were asked for."""
    data = batches(8)

    class Fails(Reruns):
        def function(self, function):
            raise BROKEN_OFF

    graphed = assert_trains_alike(
        lambda training: [training.step(data[i : i + 1]) for i in range(8)],
        GROUPED, torch.bfloat16, make_capture=Fails, careful=careful,
    )  # fmt: skip
    reason = "capturing failed: not permitted when stream is capturing"
    without = [f"CUDA graphs: not for {name} ({reason})" for name in ("clipping", "the optimizer")]
    assert graphed.said == ["CUDA graphs: on, from this step", *without]


@pytest.mark.parametrize(("careful", "tried"), [(True, False), (False, True)])
def test_leaves_room_unless_asked_for(monkeypatch, careful, tried):
    place = "litgpt_moe_ext.training.steps.graphs.graphed_loss.lack_of_memory"
    lack = "with them 7.0 GiB would be needed, 5.0 are there"
    monkeypatch.setattr(place, lambda *_: lack)
    graphed = Training(True, GROUPED, torch.bfloat16, careful=careful)
    for batch in batches(4):
        graphed.step([batch])
    assert bool(graphed.captures) == tried
    assert not graphed.loss._weights._casts
    on = f"CUDA graphs: on, from this step; casts of the experts' weights are not kept: {lack}"
    assert graphed.said == [on if tried else f"CUDA graphs: off ({lack}; --cuda_graphs true tries them anyway)"]


@pytest.mark.parametrize(("careful", "tried"), [(True, False), (False, True)])
@pytest.mark.parametrize("hooked", ["transformer.h.0.mlp", "lm_head.weight"])
def test_leaves_hooks_their_turn_unless_asked_for(careful, tried, hooked):
    graphed, calls = Training(True, careful=careful), []
    if hooked == "lm_head.weight":
        graphed.model.lm_head.weight.register_post_accumulate_grad_hook(calls.append)
    else:
        graphed.model.get_submodule(hooked).register_forward_hook(lambda *call: calls.append(call))
    for batch in batches(3):
        graphed.step([batch])
    assert bool(graphed.captures) == tried
    assert tried or len(calls) == 3
    off = f"a hook on {hooked} would not run in every pass; --cuda_graphs true tries them anyway"
    assert graphed.said == [f"CUDA graphs: {'on, from this step' if tried else f'off ({off})'}"]


def test_nothing_runs_first_while_it_is_captured(monkeypatch):
    """Neither in another form, such as sums that a product extends, nor for another shape: Triton would compile."""
    sums, extend = [], parts._sum_outer_products
    monkeypatch.setattr(parts, "_sum_outer_products", lambda call, to: sums.append(to) or extend(call, to))
    extended = []

    def make_capture():
        extended.append(any(total is not None for total in sums))
        return Reruns()

    graphed, long, short = Training(True, GROUPED, make_capture=make_capture), batches(2), batches(9, length=9)
    for batch in long:
        graphed.step([batch])
    graphed.step(short[:1])
    assert extended == []
    graphed.step(short[1:2])
    assert extended == [True]


def test_no_step_is_the_first_to_meet_what_fails(monkeypatch):
    """Such as a kernel that adds to gradients, and does not compile on a card."""
    extend, tried = parts._sum_outer_products, []

    def fails(call, to):
        if to is not None:
            tried.append(to)
            raise OutOfResources("shared memory")
        return extend(call, to)

    monkeypatch.setattr(parts, "_sum_outer_products", fails)
    data = batches(6)

    def train(training):
        return [training.step(data[i : i + 2]) for i in (0, 2, 4)]

    graphed = assert_trains_alike(train, GROUPED, torch.bfloat16)
    assert graphed.said == ["CUDA graphs: off (capturing failed: OutOfResources: shared memory)"]
    assert len(tried) == 1


def test_a_loss_that_is_no_number_says_nothing_of_a_replay():
    """It differs from everything, itself included."""
    weight, ids = nn.Parameter(torch.ones(3)), torch.zeros(1, 3)
    reference = Reference(lambda ids, _: (weight * ids / ids).sum(), ids, ids)
    nothing = Passes(lambda: None, lambda: None, torch.zeros(()), torch.ones(()), {})
    reference.compare(nothing, 1, nn.Module())


def test_numbers_that_nobody_has_taken_before_the_capture():
    data = batches(6)

    def train(training):
        training.step(data[:1])
        training.loss(data[1][:, :-1], data[1][:, 1:]).backward()
        training.optimizer.zero_grad()  # and the tallies stay
        return [training.step([batch]) for batch in data[2:]]

    assert_trains_alike(train)


def test_a_loss_goes_backward_once_and_before_the_next():
    graphed = Training(True)
    data = batches(6)
    for batch in data[:4]:
        graphed.step([batch])
    first, second = (graphed.loss(batch[:, :-1], batch[:, 1:]) for batch in data[4:])
    with pytest.raises(RuntimeError, match="before the next loss"):
        first.backward()
    second.backward()
    with pytest.raises(RuntimeError, match="once only"):
        second.backward()
