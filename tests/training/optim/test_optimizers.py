"""Parameter groups and Muon."""

import pytest
import torch
from lightning.fabric.plugins import MixedPrecision

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.training.optim.arguments import learning_rate_of
from litgpt_moe_ext.training.optim.make import make_optimizer
from litgpt_moe_ext.training.optim.muon import MuonAdamW
from litgpt_moe_ext.training.optim.orthogonal import orthogonalize
from litgpt_moe_ext.training.optim.parameter_groups import group_parameters, scale_rates
from litgpt_moe_ext.training.settings import ParameterGroupArgs
from tests.models import initialized_model, moe_config


@pytest.mark.parametrize("name", ["lr_scheduler", "collections.Counter", "builtins.print", ".near.Adam"])
def test_what_is_no_optimizer_is_refused(name):
    with pytest.raises(SettingsError, match=f"^optimizer: '{name}' must be the name of a class in torch.optim"):
        learning_rate_of(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"betas": [0.9]}, r"betas: \[0.9\] must be 2 numbers, such as \[0.9, 0.999\]"),
        ({"betas": [0.9, None]}, "betas.1: null must be a number"),
        ({"fused": "yes"}, "fused: 'yes' must be true or false"),
        ({"amsgrad": 1}, "amsgrad: 1 must be true or false"),
        ({"differentiable": True}, "differentiable: true is for gradients of a step itself"),
        ({"capturable": True}, "capturable: true needs a GPU"),
        ({"params": []}, "params: AdamW has no such argument; it has lr, betas, "),
    ],
)
def test_arguments_of_another_kind_are_refused(arguments, message):
    with pytest.raises(SettingsError, match=rf"^optimizer.init_args.{message}"):
        learning_rate_of({"class_path": "AdamW", "init_args": arguments})


def test_a_number_may_be_left_out_where_the_default_has_none():
    assert learning_rate_of({"class_path": "Adafactor", "init_args": {"lr": 0.1, "eps": [None, 0.01]}}) == 0.1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("LBFGS", "computes the loss several times .* use another, such as AdamW"),
        ("SparseAdam", "takes sparse gradients only.* use another, such as AdamW"),
        ("Muon", "takes matrices only; litgpt_moe_ext.training.optim.muon.MuonAdamW"),
    ],
)
def test_what_cannot_step_in_the_loop_is_refused(name, reason):
    for optimizer in (name, {"class_path": f"torch.optim.{name}"}):
        with pytest.raises(SettingsError, match=f"^optimizer: {name} {reason}"):
            learning_rate_of(optimizer)


@pytest.mark.parametrize("path", ["AdamW", "torch.optim.AdamW"])
@pytest.mark.parametrize("rest", [{}, {"init_args": None}, {"init_args": {"lr": 0.001}}], ids=str)
def test_what_a_recipe_may_leave_out(model, path, rest):
    """It has passed the checks, so it must make an optimizer."""
    given = {"class_path": path, **rest}
    assert learning_rate_of(given) == 0.001
    assert make_optimizer(given, model, ParameterGroupArgs()).defaults["lr"] == 0.001


@pytest.fixture(scope="module")
def model():
    shared = {"n_shared_expert": 1, "shared_expert_gate": True}
    return initialized_model(moe_config(bias=True, attention_class_name="SinkAttention", **shared))


def names_by_group(model, groups) -> list[set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [{names[id(parameter)] for parameter in group["params"]} for group in groups]


def test_one_group_unless_asked(model):
    groups = group_parameters(model, ParameterGroupArgs())
    assert [set(group) for group in groups] == [{"params"}]
    assert len(groups[0]["params"]) == len(list(model.parameters()))


def test_on_a_cpu_a_step_takes_the_order_of_the_model(model):
    """As its gradients are clipped: numbers are those of LitGPT's own optimizer."""
    seen = []
    optimizer = make_optimizer("AdamW", model, ParameterGroupArgs())
    optimizer.register_step_post_hook(lambda *_: seen.extend(optimizer.param_groups[0]["params"]))
    optimizer.step()
    assert all(one is other for one, other in zip(seen, model.parameters(), strict=True))


class Counting(torch.optim.SGD):
    """Wraps its method `step`, as optimizers of other packages may."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr=lr)
        self.steps, step = 0, self.step

        def counted(closure=None):
            self.steps += 1
            return step(closure)

        self.step = counted


def test_an_optimizer_may_wrap_its_step(model):
    optimizer = make_optimizer(
        {"class_path": f"{__name__}.Counting", "init_args": {"lr": 0.1}}, model, ParameterGroupArgs()
    )
    optimizer.step()
    assert optimizer.steps == 1


@pytest.mark.parametrize("fused", [True, False])
def test_kernels_stay_those_of_the_run(model, fused):
    """A checkpoint of another device, strategy or precision does not bring its own."""
    optimizer = make_optimizer({"class_path": "AdamW", "init_args": {"fused": fused}}, model, ParameterGroupArgs())
    state = optimizer.state_dict()
    state["param_groups"][0].update(fused=not fused, foreach=True, eps=0.5)
    optimizer.load_state_dict(state)
    assert [(group["fused"], group["foreach"], group["eps"]) for group in optimizer.param_groups] == [
        (fused, None, 0.5)
    ]


def test_groups(model):
    kinds = ["norms", "biases", "embeddings"]
    args = ParameterGroupArgs(no_weight_decay=kinds, router_lr_factor=0.5)
    groups = group_parameters(model, args)
    members = names_by_group(model, groups)
    undecayed = next(m for m, g in zip(members, groups, strict=True) if g.get("weight_decay") == 0.0)
    router = next(m for m, g in zip(members, groups, strict=True) if g.get("lr_factor") == 0.5)
    decayed = next(m for m, g in zip(members, groups, strict=True) if set(g) == {"params"})
    assert router == {f"transformer.h.{i}.mlp.gate.weight" for i in range(2)}
    assert {"transformer.wte.weight", "lm_head.weight", "transformer.ln_f.weight"} <= undecayed
    assert {
        f"transformer.h.1.{n}" for n in ("attn.sinks", "attn.qkv.bias", "mlp.experts.gate_up_bias", "norm_1.weight")
    } <= undecayed
    assert {f"transformer.h.0.{n}" for n in ("attn.qkv.weight", "mlp.experts.down_proj")} <= decayed
    assert all("weight" in name or "proj" in name for name in decayed)
    assert sum(len(m) for m in members) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("given", "fused"), [({}, True), ({"fused": False}, False), ({"foreach": False}, None), ({"lr": 0.5}, True)]
)
def test_a_fused_optimizer_is_a_default(model, given, fused):
    made = make_optimizer({"class_path": "torch.optim.AdamW", "init_args": given}, model, ParameterGroupArgs())
    assert made.defaults["fused"] is fused
    assert made.defaults["lr"] == given.get("lr", 1e-3)


@pytest.mark.parametrize("path", ["torch.optim.AdamW", "torch.optim.SGD"])
def test_a_gradient_scaler_works_with_a_fused_optimizer(path):
    """It unscales before gradients are clipped, and a step whose gradients overflow changes nothing."""
    model = torch.nn.Linear(2, 2)
    optimizer = make_optimizer({"class_path": path, "init_args": {"lr": 0.5}}, model, ParameterGroupArgs())
    assert optimizer.defaults["fused"]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    scaler.scale(torch.ones(()))  # as Fabric's backward pass does
    for value, changes in ((8.0, True), (torch.inf, False)):
        before = model.weight.detach().clone()
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        precision.unscale_gradients(optimizer)
        assert model.weight.grad.unique().tolist() == [value / 8]
        precision.optimizer_step(optimizer)
        assert torch.equal(model.weight, before) != changes


@pytest.mark.parametrize(("steps_in_parts", "rate"), [(False, 0.25), (True, 0.5)])
def test_who_scales_the_rates(model, steps_in_parts, rate):
    """Where a step calls the optimizer several times, its owner: a hook would do so at each call."""
    groups = ParameterGroupArgs(router_lr_factor=0.5)
    made = make_optimizer(
        {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}}, model, groups, steps_in_parts=steps_in_parts
    )
    made.step()
    assert {group["lr"] for group in made.param_groups} == {rate, 0.5}


def test_the_bias_of_the_output_head_is_a_bias():
    head = initialized_model(moe_config(lm_head_bias=True)).lm_head
    groups = group_parameters(torch.nn.ModuleDict({"lm_head": head}), ParameterGroupArgs(no_weight_decay=["biases"]))
    assert [(group["params"], group.get("weight_decay")) for group in groups] == [
        ([head.weight], None),
        ([head.bias], 0),
    ]


def test_tied_embeddings_count_once():
    model = initialized_model(moe_config())
    model.transformer.wte.weight = model.lm_head.weight
    groups = group_parameters(model, ParameterGroupArgs(no_weight_decay=["embeddings"]))
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_lr_factor():
    parameters = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:], "lr_factor": 0.1}], lr=1.0)
    optimizer.register_step_pre_hook(scale_rates)
    for _ in range(2):
        for group in optimizer.param_groups:
            group["lr"] = 0.5
        for parameter in parameters:
            parameter.grad = torch.ones(1)
        optimizer.step()
    assert [parameter.item() for parameter in parameters] == pytest.approx([0.0, 0.9])


@pytest.mark.parametrize("shape", [(3, 8, 20), (3, 20, 8), (1, 16, 16)])
def test_orthogonalize(shape):
    x_NAB = torch.randn(shape)
    u, _, vh = torch.linalg.svd(x_NAB, full_matrices=False)
    result = orthogonalize(x_NAB)
    assert result.dtype == torch.float32, "bfloat16 products take a CPU many times as long"
    singular = torch.linalg.svdvals(result)
    assert singular.min() > 0.5
    assert singular.max() < 1.3
    # Same singular vectors: the product with U V^T is nearly symmetric positive, its trace nearly the rank.
    trace = torch.einsum("nab,nab->n", result, u @ vh)
    assert (trace / min(shape[1:]) - 1).abs().max() < 0.25


def test_muon_is_that_of_torch_on_matrices():
    torch.manual_seed(0)
    start = torch.randn(24, 16)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "ns_steps": 1}
    first = MuonAdamW([{"params": [ours], "matrix_parts": 1}], **settings)
    second = torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **settings)
    for _ in range(4):
        gradient = torch.randn(24, 16)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        first.step()
        second.step()
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=1e-2)
    assert (ours - start).abs().max() > 0.02


def test_stacked_experts_are_independent_matrices():
    """A stack moves as its matrices would move alone; the halves of a two-part stack as well."""
    start, gradient = torch.randn(3, 12, 8), torch.randn(3, 12, 8)
    gradient[1] = 0  # no token has chosen it

    def moved(weight: torch.Tensor, grad: torch.Tensor, parts: int) -> torch.Tensor:
        parameter = torch.nn.Parameter(weight.clone())
        parameter.grad = grad.clone()
        MuonAdamW([{"params": [parameter], "matrix_parts": parts}], lr=0.1).step()
        return parameter.detach()

    stacked = moved(start, gradient, 2)
    for e in range(3):
        for half in (slice(0, 6), slice(6, 12)):
            alone = moved(start[e, half], gradient[e, half], 1)
            torch.testing.assert_close(stacked[e, half], alone, atol=1e-3, rtol=1e-2)


def test_the_rest_is_adamw_and_state_survives(model):
    groups = group_parameters(model, ParameterGroupArgs(), split_matrices=True)
    members = names_by_group(model, groups)
    muon = set().union(*(m for m, g in zip(members, groups, strict=True) if "matrix_parts" in g))
    parts = {name: group.get("matrix_parts") for names, group in zip(members, groups, strict=True) for name in names}
    assert parts["transformer.h.0.mlp.experts.gate_up_proj"] == 2
    assert parts["transformer.h.0.mlp.experts.down_proj"] == 1
    assert "transformer.h.0.attn.qkv.weight" in muon
    assert not any(name in muon for name in ("transformer.wte.weight", "lm_head.weight"))
    assert not any("gate." in name or "norm" in name or "bias" in name for name in muon)

    vector = torch.randn(5)
    ours, theirs = torch.nn.Parameter(vector.clone()), torch.nn.Parameter(vector.clone())
    settings = {"lr": 0.1, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 0.01}
    first, second = MuonAdamW([ours], **settings), torch.optim.AdamW([theirs], **settings)
    for step in range(4):
        ours.grad = theirs.grad = torch.randn(5)
        first.step()
        second.step()
        if step == 1:
            resumed = MuonAdamW([ours], **settings)
            resumed.load_state_dict(first.state_dict())
            first = resumed
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "setting", [{"lr": -1}, {"momentum": 1.0}, {"ns_steps": 0}, {"ns_steps": 100}, {"betas": (0.9, 1.0)}]
)
def test_wrong_settings(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        MuonAdamW([torch.nn.Parameter(torch.zeros(2))], **setting)


def test_muon_updates_what_is_alike_together(monkeypatch):
    """As on a GPU: matrices of the same two sides in one product, also stacked, in parts, standing, of other groups."""
    shapes = [(4, 6)] * 5 + [(3, 8, 4)] * 3 + [(6, 2), (4, 6)], [(3, 6, 2), (2, 6), (6, 2), (2, 4, 4)]

    def trained():
        torch.manual_seed(0)
        first, second = ([torch.nn.Parameter(torch.randn(shape)) for shape in some] for some in shapes)
        groups = [
            {"params": first, "matrix_parts": 2},
            {"params": second, "matrix_parts": 1, "lr": 0.3, "weight_decay": 0.0, "momentum": 0.5},
        ]
        optimizer = MuonAdamW(groups, lr=0.1)
        for _ in range(3):
            for parameter in (*first, *second):
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        return [*first, *second]

    alone, batches = trained(), []
    monkeypatch.setattr("litgpt_moe_ext.training.optim.orthogonal._most_together", lambda device: 200)
    monkeypatch.setattr(
        "litgpt_moe_ext.training.optim.orthogonal.orthogonalize",
        lambda x_NAB, steps: batches.append(tuple(x_NAB.shape)) or orthogonalize(x_NAB, steps),
    )
    for together, expected in zip(trained(), alone, strict=True):
        torch.testing.assert_close(together, expected)
    # (N, A, B): of lists with at most 200 elements; what is left over is turned where it is multiplied.
    assert batches == 3 * [(16, 2, 6), (1, 6, 2), (12, 4, 4), (8, 4, 4), (2, 3, 2)]


@pytest.mark.parametrize("name", ["NAdam", "ASGD", "AdamW"])
def test_a_loaded_state_is_the_saved_one_beside_16_bit_weights(name):
    """Single numbers included, which torch would round to the type of the weights."""

    def made():
        model = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
        return make_optimizer(name, model, ParameterGroupArgs())

    first, second = made(), made()
    for _ in range(3):
        for group in first.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        first.step()
    saved = first.state_dict()
    second.load_state_dict(saved)
    for number, state in second.state_dict()["state"].items():
        for key, value in state.items():
            expected = saved["state"][number][key]
            assert (value.dtype, value.tolist()) == (expected.dtype, expected.tolist()), key
