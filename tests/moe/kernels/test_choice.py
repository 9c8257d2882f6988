"""Which backend computes the experts: one table, and no way around it."""

import warnings

import pytest
import torch

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.moe.activations import Activation
from litgpt_moe_ext.moe.experts import Experts
from litgpt_moe_ext.moe.kernels.backend import ExpertBackend, Place, Preference
from litgpt_moe_ext.moe.kernels.choice import backend_for, choose
from litgpt_moe_ext.moe.kernels.loop import loop_experts
from litgpt_moe_ext.moe.kernels.plan import kind_of
from litgpt_moe_ext.moe.kernels.registry import BACKENDS, CHOSEN, PREFERENCES, register_backend
from litgpt_moe_ext.moe.registry import ACTIVATIONS, EXPERT_BACKENDS
from tests.models import moe_config, randomize

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    CHOSEN.clear()
    yield
    CHOSEN.clear()


@pytest.fixture
def registries():
    """The tables that a backend is registered in, which are as before when a test ends."""
    tables = BACKENDS, PREFERENCES, EXPERT_BACKENDS
    before = [table.copy() for table in tables]
    yield tables
    for table, then in zip(tables, before, strict=True):
        table.clear()
        table.update(then) if isinstance(table, dict) else table.extend(then)


def place(device="cuda", capability=(8, 6), dtype=BF16, compiling=False, widths=(16, 24), chip=""):
    return Place(device, capability if device == "cuda" else None, dtype, compiling, widths, chip)


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize(
    ("capability", "native"),
    [((8, 0), 0), ((8, 6), 0), ((8, 9), 0), ((9, 0), 0), ((10, 0), 1), ((10, 3), 1), ((11, 0), 0), ((12, 0), 0)],
    ids=str,
)
def test_native_products_only_where_they_are_not_known_to_be_slower(capability, native, compiling):
    for dtype in (BF16, FP16, FP32):
        expected = "grouped_mm" if native and dtype == BF16 else "triton"
        assert choose(place(capability=capability, dtype=dtype, compiling=compiling)) == expected


def test_widths_that_torch_cannot_take():
    assert choose(place(capability=(10, 0), widths=(16, 20))) == "triton"


def test_turing():
    assert choose(place(capability=(7, 5), dtype=FP16)) == "triton"
    with pytest.warns(RuntimeWarning, match="bfloat16 needs compute capability 8.0"):
        assert choose(place(capability=(7, 5))) == "loop"


@pytest.mark.parametrize(("dtype", "compiled"), [(FP32, "grouped_mm"), (BF16, "grouped_mm"), (FP64, "loop")])
def test_cpu(dtype, compiled):
    assert choose(place("cpu", dtype=dtype)) == "grouped_cpu"
    assert choose(place("cpu", dtype=dtype, compiling=True)) == compiled
    assert choose(place("cpu", dtype=BF16, compiling=True, widths=(16, 12))) == "loop"


def test_other_devices():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(place("mps", dtype=FP16)) == "loop"
        for chip in ("gfx90a", "gfx942", "gfx1100", "gfx1201"):
            assert choose(place("hip", chip=chip)) == "triton"
    with pytest.warns(RuntimeWarning, match="triton cannot be used because it has no products for gfx1030"):
        assert choose(place("hip", chip="gfx1030")) == "loop"


def test_without_triton_the_loop_is_announced_once(monkeypatch, recwarn):
    """Windows without triton-windows."""
    monkeypatch.setattr("litgpt_moe_ext.kernels.launch.triton_installed", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 6))
    for _ in range(2):
        assert backend_for(torch.device("cuda"), BF16, (16, 24)) == "loop"
    assert choose(place(capability=(9, 0))) == "grouped_mm"
    messages = [str(warning.message) for warning in recwarn if issubclass(warning.category, RuntimeWarning)]
    assert len(messages) == 1
    assert (
        "triton cannot be used because Triton is not installed (on Windows: pip install triton-windows)" in messages[0]
    )


@pytest.mark.parametrize(
    ("forced", "where", "reason"),
    [
        ("fastest", place(), "expert_backend: 'fastest' must be one of loop, grouped_cpu, grouped_mm, triton"),
        ("grouped_cpu", place(), "it works on cpu tensors, these are on cuda"),
        ("grouped_mm", place(widths=(16, 20)), "widths in multiples of 16 bytes, not 16 and 20"),
        ("grouped_mm", place(dtype=FP64), "it has no torch.float64"),
        ("triton", place("cpu"), "on cpu ones under TRITON_INTERPRET=1"),
        ("triton", place(capability=(7, 0), dtype=FP16), "it needs compute capability 7.5, this card has 7.0"),
        ("triton", place(dtype=FP64), "it has no torch.float64"),
    ],
)
def test_a_forced_backend_that_cannot_work_is_refused(forced, where, reason):
    with pytest.raises(SettingsError) as error:
        choose(where, forced)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_triton_can_be_forced_in_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose(place("cpu", dtype=FP32), "triton") == "triton"
    assert choose(place("cpu", dtype=FP32)) == "grouped_cpu"


def test_the_configuration_forces_a_backend():
    x = torch.randn(3, 16)
    assert Experts(moe_config()).backend_for(x) == "grouped_cpu"
    assert Experts(moe_config(expert_backend="loop")).backend_for(x) == "loop"
    with pytest.raises(SettingsError, match="expert_backend: 'triton' cannot be used here: it works on cuda tensors"):
        Experts(moe_config(expert_backend="triton")).backend_for(x)


@pytest.mark.usefixtures("registries")
def test_a_backend_of_a_third_party():
    """It is preferred where it says, can be forced by name, and says what it cannot do."""
    from litgpt_moe_ext.moe.layer import SharedExpertMoE

    calls = []

    def mine(x_TD, routing, weights, hidden):
        calls.append(len(x_TD))
        return loop_experts(x_TD, routing, weights, hidden)

    def obstacle(place):
        return "it wants float32" if place.dtype != FP32 else None

    register_backend(ExpertBackend("mine", mine, obstacle), Preference(("mine", "grouped_cpu"), device="cpu"))
    moe = randomize(SharedExpertMoE(moe_config(expert_backend="mine")))
    moe(torch.randn(2, 9, 16))
    assert calls == [18]
    assert choose(place("cpu", dtype=FP32)) == "mine"
    assert choose(place("cpu", dtype=BF16)) == "grouped_cpu"
    with pytest.raises(SettingsError, match="'mine' cannot be used here: it wants float32"):
        choose(place("cpu", dtype=BF16), "mine")


@pytest.mark.usefixtures("registries")
def test_what_was_chosen_is_forgotten_when_a_backend_is_registered():
    """A script may do so after it has tried a model."""
    wanted = torch.device("cpu"), FP32, (16, 24)
    assert backend_for(*wanted) == "grouped_cpu"
    register_backend(MINE, Preference(("mine",)))
    assert backend_for(*wanted) == "mine"


def works(place):
    return None


MINE = ExpertBackend("mine", loop_experts, works)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((ExpertBackend("loop", print, works),), "'loop' is registered already; choose another name"),
        ((loop_experts,), "'backend': <function loop_experts .* must be an instance of ExpertBackend"),
        ((ExpertBackend("my backend", loop_experts, works),), "'my backend' must be a name of letters"),
        ((ExpertBackend("mine", "loop_experts", works),), "'mine': function is 'loop_experts'; it must be a function"),
        ((ExpertBackend("mine", loop_experts, None),), "'mine': obstacle is None; it must be a function"),
        ((MINE, Preference("mine")), "'mine': backends is 'mine'; it must be a tuple of names of loop,"),
        ((MINE, Preference(5)), "'mine': backends is 5; it must be a tuple of names of loop,"),
        ((MINE, Preference((["mine"],))), r"backends is \(\['mine'\],\); it must be a tuple of names of loop,"),
        ((MINE, Preference(("mine", "lop"))), "it must be a tuple of names of loop, .*, mine"),
        ((MINE, ("mine",)), "'mine': .* must be an instance of Preference"),
    ],
)
def test_what_is_no_backend_is_not_registered(given, message, registries):
    before = [list(table) for table in registries]
    with pytest.raises(ValueError, match=message):
        register_backend(*given)
    assert [list(table) for table in registries] == before


def test_a_backend_may_be_registered_twice(registries):
    """As a script and the entry point of its package do."""
    register_backend(MINE, Preference(("mine",)))
    after = [list(table) for table in registries]
    register_backend(MINE, Preference(("mine",)))
    assert [list(table) for table in registries] == after
    assert EXPERT_BACKENDS.count("mine") == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            lambda y_TD: y_TD[:1],
            r"'mine' returns \(1, 16\) in torch.float32; \(T, D\) is \(9, 16\), in the torch.float32",
        ),
        (lambda y_TD: y_TD.double(), r"'mine' returns \(9, 16\) in torch.float64"),
        (lambda y_TD: (y_TD,), "'mine' returns a tuple; it must return a tensor"),
        (lambda y_TD: y_TD.detach(), "'mine' returns sums without a gradient"),
    ],
)
@pytest.mark.usefixtures("registries")
def test_what_a_backend_returns_is_checked(changed, message):
    """One row would be added to all tokens, and experts without a gradient would never learn."""
    from litgpt_moe_ext.moe.layer import SharedExpertMoE

    backend = ExpertBackend("mine", lambda *arguments: changed(loop_experts(*arguments)), works)
    register_backend(backend, Preference(("mine",)))
    moe = randomize(SharedExpertMoE(moe_config()))
    with pytest.raises((TypeError, ValueError), match=message):
        moe(torch.randn(1, 9, 16))


@pytest.mark.usefixtures("registries")
def test_a_backend_may_return_no_gradient_where_none_is_asked_for():
    from litgpt_moe_ext.moe.layer import SharedExpertMoE

    backend = ExpertBackend("mine", lambda *arguments: loop_experts(*arguments).detach(), works)
    register_backend(backend, Preference(("mine",)))
    with torch.no_grad():
        assert randomize(SharedExpertMoE(moe_config()))(torch.randn(1, 9, 16)).shape == (1, 9, 16)


@pytest.mark.parametrize(
    ("dtype", "card", "setting", "expected"),
    [
        (torch.bfloat16, (8, 0), "high", ("half", "ieee")),
        (torch.float16, None, "high", ("half", "ieee")),
        # In the interpreter, which has no such product.
        (torch.bfloat16, None, "high", ("half", "widened")),
        (torch.float32, None, "high", ("tf32", "tf32")),
        (torch.float32, (8, 0), "highest", ("ieee", "ieee")),
        (torch.float32, (8, 0), "high", ("tf32", "tf32")),
        (torch.float32, (9, 0), "medium", ("tf32", "tf32")),
        (torch.float32, (7, 5), "high", ("ieee", "ieee")),
        (torch.float32, "hip", "high", ("ieee", "ieee")),
    ],
    ids=str,
)
def test_float32_is_tf32_for_those_who_allow_it_where_there_is_one(dtype, card, setting, expected, monkeypatch):
    common = pytest.importorskip("litgpt_moe_ext.moe.kernels.triton.common", exc_type=ImportError)
    monkeypatch.setattr(torch.version, "hip", "6.4" if card == "hip" else None)
    monkeypatch.setattr(common, "capability_of", lambda device: (9, 4) if card == "hip" else card)
    torch.set_float32_matmul_precision(setting)
    assert common.precision_for(torch.device("cuda"), dtype) == expected


@pytest.mark.parametrize(
    ("name", "plain", "tanh"),
    [
        ("swiglu", "silu", "silu"),
        ("clamped_swiglu", "clamped_silu", "clamped_silu"),
        ("geglu", "gelu", "gelu_tanh"),
        ("gelu", "gelu", "gelu_tanh"),
        ("relu", "relu", "relu"),
        ("relu2", "relu2", "relu2"),
    ],
)
def test_which_activations_the_kernels_know(name, plain, tanh):
    """As `gelu_approximate` says, which changes no other function."""
    assert [kind_of(Activation(name, approximate)) for approximate in ("none", "tanh")] == [plain, tanh]


def test_the_kernels_know_no_activation_of_another_package(monkeypatch):
    monkeypatch.setitem(ACTIVATIONS, "own", ACTIVATIONS["gelu"])
    assert kind_of(Activation("own", "tanh")) is None
