"""Every Triton kernel compiled for every kind of card, without one: shared memory, spilled registers, success.

The launchers run as they would on a card; a stand-in for Triton's driver names the card, and instead of being started a
kernel is compiled as its arguments ask (alignment and ones included).
"""

import re
import subprocess
from itertools import cycle
from pathlib import Path

import pytest
import torch

from litgpt_moe_ext.moe.activations import Activation
from litgpt_moe_ext.moe.kernels.calls import ExpertWeights
from litgpt_moe_ext.moe.kernels.plan import Gates, Mask, Outer, Product, plan_of
from litgpt_moe_ext.moe.kernels.routing.balancing import Moved
from litgpt_moe_ext.moe.kernels.routing.fused_router import Given, Rule
from litgpt_moe_ext.moe.kernels.routing.router_product import ProjectionBackward

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402

from litgpt_moe_ext.moe.kernels import triton as engine  # noqa: E402
from litgpt_moe_ext.moe.kernels.triton import (  # noqa: E402
    activation,
    balancing,
    biases,
    common,
    gating,
    orthogonality,
    projecting,
)
from litgpt_moe_ext.moe.kernels.triton.routing import blocks, launches  # noqa: E402
from litgpt_moe_ext.moe.kernels.triton.tiling import tile_choice  # noqa: E402
from litgpt_moe_ext.moe.kernels.triton.tiling.tiles import CARDS, RowsWork, WeightsWork, card_for, precision_of  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# MI200, MI300, RX 7900 and RX 9070, and how many threads work in step on them.
AMD_CHIPS = {"gfx90a": 64, "gfx942": 64, "gfx1100": 32, "gfx1201": 32}
CAPABILITIES = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
KERNELS = (
    *("activation", "balancing", "biases", "combining", "decoding", "gating", "orthogonality", "projecting"),
    *("routing.launches", "rows", "weights"),
)
HALF = (torch.float16, torch.bfloat16)
# How much a thread copies to shared memory in one instruction, at best 16 bytes, and reads or writes by another.
COPIES = re.compile(r"cp\.async\.c[ag]\.shared\.global .*?, (\w+),")
READS, WRITES = (re.compile(rf"{word}\.global\.((?:v\d\.)?b\d+)") for word in ("ld", "st"))
LONG_DIVISION = re.compile(r"(div|rem)\.[su]64")  # of integers; in a loop a third of its instructions
TENSOR_CORES = re.compile(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma")


class Driver:
    """What Triton asks its driver before it compiles. Kernels are remembered per device, so each card is one."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch

    def get_current_stream(self, _device):
        return 0


def nvidia(capability):
    return GPUTarget("cuda", 10 * capability[0] + capability[1], 32)


class Compiler:
    """Compiles instead of launching.

    Attributes:
        kernels: Name and compiled kernel of everything that would have been launched.
        processors: How many multiprocessors the card has; none is too few for blocks of small products.
    """

    def __init__(self, monkeypatch, capability, target=None):
        self.capability, self.kernels, self.processors = capability, [], 0
        monkeypatch.setattr(triton.runtime.driver, "_active", Driver(target or nvidia(capability)))
        monkeypatch.setattr(common, "capability_of", lambda device: capability)
        for name in KERNELS:
            monkeypatch.setattr(f"litgpt_moe_ext.moe.kernels.triton.{name}.launch", self.launch)
        monkeypatch.setattr(tile_choice, "capability_of", lambda device: capability)
        monkeypatch.setattr(tile_choice, "processors_of", lambda device: self.processors)

    def launch(self, kernel, grid, arguments, warps, stages=1):
        options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
        compiled = kernel.warmup(*arguments, grid=grid, **options)
        self.kernels.append((f"{kernel.fn.__name__} {arguments[-2:]} of {arguments[0][0].dtype}", compiled))

    def check_shared_memory(self):
        """Hold it against the card's; return how many kernels passed."""
        for name, compiled in self.kernels:
            assert compiled.metadata.shared <= 1024 * card_for(self.capability).shared_kib, name
        return len(self.kernels)

    def check(self, tmp_path):
        """Hold registers against the stack as well, and divisions of 64 bits against none; return how many passed."""
        for name, compiled in self.kernels:
            assert not LONG_DIVISION.search(compiled.asm["ptx"]), name
            cubin = tmp_path / "kernel.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
            stack, local = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("STACK", "LOCAL"))
            assert stack == local == 0, f"{name} on {self.capability}: {stack} bytes of stack, {local} spilled"
        return self.check_shared_memory()


def compiler_for_amd(monkeypatch, chip):
    """Return a compiler for one of `AMD_CHIPS`, in a torch that was built for it."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    # What torch calls the capability of a chip is the beginning of its name.
    return Compiler(monkeypatch, (9, 4), GPUTarget("hip", chip, AMD_CHIPS[chip]))


# Widths that blocks divide, that they do not divide, and that are read element by element.
WIDTHS = {"even": (512, 256), "uneven": (208, 144), "odd": (72, 40)}


def product(dtype, mean_rows, widths, forward, E=2):
    """Return a product of rows and weights as in a forward pass, or of rows and transposed weights."""
    n_row, (out, inner) = E * mean_rows, WIDTHS[widths]
    # Two choices per token: a single one would be a constant to Triton.
    n_token = n_row // 2
    plan = plan_of(torch.arange(n_row), torch.arange(1, E + 1, dtype=torch.int32) * mean_rows, n_token)
    x = torch.empty(n_token if forward else n_row, inner, dtype=dtype)
    if forward:
        return Product(x, torch.empty(E, out, inner, dtype=dtype), torch.empty(E, out), plan, gather=True)
    return Product(x, torch.empty(E, inner, out, dtype=dtype).transpose(1, 2), None, plan, scatter=True)


def outer(dtype, widths, gather_left):
    out, inner = WIDTHS[widths]
    plan = plan_of(torch.arange(64), torch.tensor([32, 64], dtype=torch.int32), 32)
    n_left, n_right = (32, 64) if gather_left else (64, 32)
    x, y = torch.empty(n_left, out, dtype=dtype), torch.empty(n_right, inner, dtype=dtype)
    return Outer(x, y, plan, gather_left, not gather_left)


def sum_outer_products(dtype, widths, gather_left, add):
    """Run a gradient of weights, written or added to another, which takes more registers."""
    total = torch.empty(2, *WIDTHS[widths]) if add else None
    engine.sum_outer_products(outer(dtype, widths, gather_left), torch.float32, total)


def every_product(compiler, dtype):
    """Run every block of the tables, both ways round."""
    for widths in WIDTHS:
        for mean_rows in (16, 64, 200) if widths != "odd" else (64,):
            for forward in (True, False):
                engine.multiply_rows(product(dtype, mean_rows, widths, forward))
        sum_outer_products(dtype, widths, gather_left=widths == "even", add=widths != "even")
    sum_outer_products(dtype, "even", gather_left=False, add=True)
    compiler.processors = 10**6
    for widths, add in (("even", False), ("even", True), ("uneven", True)):
        sum_outer_products(dtype, widths, gather_left=not add, add=add)


def everything_else(dtype):
    """Run what has no table of blocks."""
    h, x, plan = torch.empty(8, 256, dtype=dtype), torch.empty(4, 64, dtype=dtype), outer(dtype, "even", False).plan
    gates = Gates(torch.empty(4, 2), torch.arange(8))
    for name, approximate in (("swiglu", ""), ("clamped_swiglu", ""), ("geglu", ""), ("geglu", "tanh"), ("relu2", "")):
        mask = Mask(torch.empty(8, 128, dtype=torch.bool), 2.0) if name == "swiglu" else Mask()
        engine.activate(h, Activation(name, approximate), mask)
        size = 128 if name != "relu2" else 256
        engine.activate_backward(h, torch.empty(8, size, dtype=dtype), gates, Activation(name, approximate), mask)
        if size == 128:
            gate, up = torch.empty(2, 8, 128, dtype=dtype)
            activation.glu(gate, up, Activation(name, approximate))
            activation.glu_backward(gate, gate, up, Activation(name, approximate))
    engine.combine(h, gates.gates_TK, 4, torch.float32)
    engine.combine(h, None, 4, dtype)
    engine.combine(h, gates.gates_TK, 4, dtype, h[:4])
    for scatter in (False, True):
        biases.add_biases(h, torch.empty(2, 256), plan, scatter)
    logits, real = h[:, :1].contiguous(), torch.empty(8, dtype=torch.bool)
    for gate, padding in ((logits, None), (logits, real), (None, real)):
        gating.add_gated(h, h, gate, padding)
        gating.add_gated_backward(h, h, gate, padding)
    engine.sum_rows(x, None, plan, False, torch.float32)
    engine.sum_rows(x, gates.gates_TK, plan, True, dtype)
    stack = ExpertWeights(torch.empty(3, 96, 64), torch.empty(3, 96), torch.empty(3, 64, 48), torch.empty(3, 64))
    engine.decode(x, gates.gates_TK, torch.zeros(4, 2, dtype=torch.int64), stack, Activation("swiglu"))


RULES = (
    Rule("sigmoid", 2, True, 2.5, 2, 1, 2, balancing=0.01, sequence=0.01, z=0.001, sequences=2),
    Rule("softmax", 8, True, balancing=0.01, global_batch=True),
    Rule("chosen", 2, balancing=0.01, sequence=0.01, z=0.001, importance=0.1, load=0.1),
)


def every_rule(n_expert):
    """Run the kernels of the fused router, in training and in evaluation."""
    for rule in RULES:
        logits = torch.empty(72, n_expert)
        noisy = rule.score == "chosen"
        beside = (None, logits, logits) if noisy else (torch.empty(n_expert), None, None)
        # With padding, and a loss that does not look at tokens, which take more registers; one without them too.
        padded = (torch.empty(72, dtype=torch.bool), torch.empty(()))
        for real, other in ((None, None), padded) if rule.score == "softmax" else (padded,):
            given = Given(logits, *beside, real, other)
            _, experts, _, ends, _, slopes, _ = launches.route(given, rule, True)
            launches.route_backward(given, rule, experts, ends, slopes, torch.empty(72, rule.top_k), torch.empty(()))
            launches.route(Given(logits, real_T=real), Rule(*rule[:7]), False)
        launches.route(Given(logits[:1], None if noisy else beside[0], real_T=padded[0][:1]), Rule(*rule[:7]), False)


def every_router(n_expert):
    """Do that with few blocks, and with many where they have kernels of their own; and all else that routers have."""
    every_rule(n_expert)
    if n_expert <= launches._FEW_EXPERTS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launches, "_FEW_BLOCKS", 0)
            every_rule(n_expert)
    products = torch.empty(n_expert, n_expert)
    orthogonality.loss(products, 0.01)
    orthogonality.slopes(products, torch.empty(()), 0.01)
    for n_layer, schedule in ((3, None), (129, {"warmup_steps": 9, "decay_start": 99})):
        moved = torch.empty(n_layer, n_expert), torch.empty(n_layer, n_expert + 3, dtype=torch.float64)
        updates = () if schedule is None else torch.zeros(n_layer, dtype=torch.int64)
        balancing.move_biases(Moved(*map(tuple, moved), tuple(updates), 0.001, schedule))
    hashes = torch.empty(72, n_expert, dtype=torch.int64)
    launches.route(Given(hashes, real_T=torch.empty(72, dtype=torch.bool)), Rule("even", 2), True)


def every_gate(dtype, n_expert, width=768, narrow=None):
    """Run a router's product forward and backward, with the tokens for experts in two dtypes and without."""
    x, weight = torch.empty(2048, width, dtype=dtype), torch.empty(n_expert, width)
    call = ProjectionBackward(torch.empty(2048, n_expert), x, weight, None, None, True, True)
    projecting.project_backward(call)
    for passed in dict.fromkeys((dtype, narrow or dtype)):
        projecting.project(x, weight, passed)
        projecting.project_backward(call._replace(routed_TD=x.to(passed), shared_TD=x.to(passed)))


def test_a_sample(monkeypatch, tmp_path):
    """Products of a training step in bfloat16, a router that learns and one that generates, on a card of 99 KiB."""
    compiler = Compiler(monkeypatch, (8, 6))
    engine.multiply_rows(product(torch.bfloat16, 200, "even", forward=True))
    sum_outer_products(torch.bfloat16, "even", gather_left=False, add=True)
    launches.route(Given(torch.empty(40, 8), torch.empty(8)), Rule("sigmoid", 2, True, balancing=0.01), True)
    launches.route(Given(torch.empty(40, 8), torch.empty(8)), Rule("sigmoid", 2, True), False)
    every_gate(torch.bfloat16, 8)
    assert compiler.check(tmp_path) == 8


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
def test_every_product(monkeypatch, tmp_path, capability, dtype, precision):
    if (dtype in HALF and precision == "high") or (capability == (7, 5) and dtype == torch.bfloat16):
        pytest.skip("the same, or refused")
    torch.set_float32_matmul_precision(precision)
    compiler = Compiler(monkeypatch, capability)
    every_product(compiler, dtype)
    assert compiler.check(tmp_path) == 21


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float16), ((8, 6), torch.bfloat16),
                                                  ((9, 0), torch.bfloat16), ((12, 0), torch.float32)])  # fmt: skip
def test_everything_else(monkeypatch, tmp_path, capability, dtype):
    compiler = Compiler(monkeypatch, capability)
    everything_else(dtype)
    assert compiler.check(tmp_path) == 33


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "n_expert"),
    [((7, 5), 8), ((8, 6), 160), ((9, 0), 1), *zip(CAPABILITIES, cycle((384, 1024)), strict=False)],
    ids=str,
)
def test_every_router(monkeypatch, tmp_path, capability, n_expert):
    """Kimi K2 has 384 experts; Qwen3-Next's 512 are the same kernels; 1024 is the most."""
    compiler = Compiler(monkeypatch, capability)
    every_router(n_expert)
    assert compiler.check(tmp_path) == (61 if n_expert <= 128 else 39 + 9 * (n_expert > 512))


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
def test_routers_of_many_tokens(monkeypatch, tmp_path, capability):
    """So many that several programs add them up."""
    compiler = Compiler(monkeypatch, capability)
    for n_expert in (128, 384):
        logits = torch.empty(2**15, n_expert)
        launches.route(Given(logits, torch.empty(n_expert)), RULES[0], True)
        launches.route(Given(logits, None, logits, logits), RULES[2], True)
    assert compiler.check(tmp_path) == 16


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "dtypes", "n_experts"),
    [
        ("gfx90a", (torch.float16,), (8,)),
        ("gfx942", (torch.float16, torch.bfloat16, torch.float32), (8, 384, 1024)),
        ("gfx1100", (torch.bfloat16,), (384,)),
        ("gfx1201", (torch.float32,), (1024,)),
    ],
)
def test_every_kernel_on_amd(monkeypatch, chip, dtypes, n_experts):
    """Whatever the user says of float32 products, of which most of AMD's chips have one kind."""
    torch.set_float32_matmul_precision("high")
    compiler = compiler_for_amd(monkeypatch, chip)
    for dtype in dtypes:
        every_product(compiler, dtype)
    everything_else(torch.bfloat16)
    for n_expert in n_experts:
        every_router(n_expert)
    every_gate(torch.bfloat16, 8)
    routers = {8: 61, 384: 39, 1024: 48}
    assert compiler.check_shared_memory() == 21 * len(dtypes) + 33 + sum(routers[n] for n in n_experts) + 3


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
def test_every_gate(monkeypatch, tmp_path, capability):
    compiler = Compiler(monkeypatch, capability)
    half = torch.float16 if capability == (7, 5) else torch.bfloat16
    every_gate(half, 8)
    every_gate(half, 32)
    every_gate(half, 64, width=72)
    every_gate(torch.float32, 64, narrow=half)
    assert compiler.check(tmp_path) == 14
    # Which Triton up to 3.8 takes for wrong sums where a loop adds several products to one.
    assert not any("tcgen05" in compiled.asm["ptx"] for _, compiled in compiler.kernels)


@pytest.mark.slow
def test_every_gate_on_hopper(monkeypatch, tmp_path):
    """The others: where blocks differ, other widths, and one expert, a constant to Triton."""
    compiler = Compiler(monkeypatch, (9, 0))
    every_gate(torch.float32, 8, narrow=torch.bfloat16)
    every_gate(torch.bfloat16, 64)
    every_gate(torch.bfloat16, 8, width=72)
    every_gate(torch.bfloat16, 1)
    assert compiler.check(tmp_path) == 14


@triton.jit
def _store_softplus(x, out):
    triton.language.store(out, blocks._softplus(triton.language.load(x)))


def test_a_deviation_that_is_no_number_stays_none(monkeypatch):
    """The minimum of NaN and 20 is NaN in the interpreter, and 20 on a GPU."""
    compiler = Compiler(monkeypatch, (8, 6))
    compiler.launch(_store_softplus, (1,), (torch.empty(1), torch.empty(1)), warps=1)
    code = compiler.kernels[0][1].asm["ptx"]
    assert "ex2.approx" in code
    assert not re.search(r"\bm(in|ax)\.f32", code)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(
    "capability", [(8, 6), *(pytest.param(c, marks=pytest.mark.slow) for c in CAPABILITIES[1:])], ids=str
)
def test_products_move_16_bytes_at_a_time_and_use_tensor_cores(monkeypatch, capability, dtype):
    """Nothing else would say that a compiler no longer knows how numbers are aligned, which makes products slow.

    Tensor Cores of Hopper and of Blackwell for data centres read TF32 only with the numbers of a sum side by side, so
    Triton turns the other operands while it copies them, number by number.
    """
    torch.set_float32_matmul_precision("high")
    compiler = Compiler(monkeypatch, capability)
    for widths in ("even", "uneven"):
        for forward in (True, False):
            engine.multiply_rows(product(dtype, 200, widths, forward))
        sum_outer_products(dtype, widths, gather_left=forward, add=widths == "even")
    assert len(compiler.kernels) == 6
    for name, compiled in compiler.kernels:
        code = compiled.asm["ptx"]
        assert TENSOR_CORES.search(code), name
        turns = dtype == torch.float32 and capability[0] in (9, 10) and "gather=True" not in name
        assert turns or set(COPIES.findall(code)) == {"0x10"}, name
        assert set(WRITES.findall(code)) == {"v4.b32"}, name
        # What else is read, where an expert's rows begin and which they are, has 32 bits or more.
        assert not {"b8", "b16"} & set(READS.findall(code)), name


def test_sums_over_experts_read_all_rows_at_once(monkeypatch):
    compiler = Compiler(monkeypatch, (8, 6))
    engine.combine(torch.empty(16, 256, dtype=torch.bfloat16), torch.empty(4, 4), 4, torch.bfloat16)
    assert not re.search(r"\bbra\b", compiler.kernels[0][1].asm["ptx"])


def test_gradients_of_weights_mask_one_operand(monkeypatch):
    compiler = Compiler(monkeypatch, (8, 6))
    sum_outer_products(torch.bfloat16, "even", gather_left=False, add=False)
    # How many bytes are copied and not set to zero: one number for all copies of an operand that has no mask.
    kept = re.findall(r"cp\.async\.cg\.shared\.global .*?, 0x10, (\S+);", compiler.kernels[0][1].asm["ptx"])
    assert len(kept) == 24
    assert max(map(kept.count, kept)) == 4


@pytest.mark.parametrize("columns_first", [False, True], ids=["rows", "columns"])
def test_operands_of_more_than_2_31_elements_are_counted_in_64_bits(monkeypatch, columns_first):
    """However they lie in memory before they are copied."""
    wide = []
    for module in ("rows", "weights"):
        monkeypatch.setattr(
            f"litgpt_moe_ext.moe.kernels.triton.{module}.launch", lambda *launch: wide.append(launch[2][-2].wide)
        )
    for n_token in (2**20, 2**21):
        x = torch.empty((1024, n_token) if columns_first else (n_token, 1024), device="meta", dtype=torch.bfloat16)
        x = x.t() if columns_first else x
        with torch.device("meta"):
            plan = plan_of(torch.empty(n_token, dtype=torch.int64), torch.empty(2, dtype=torch.int32), n_token)
            narrow = torch.empty(n_token, 16, dtype=torch.bfloat16)
            engine.multiply_rows(Product(x, torch.empty(2, 16, 1024, dtype=torch.bfloat16), None, plan, gather=True))
        engine.sum_outer_products(Outer(narrow, x, plan, False, True), torch.float32)
    assert wide == [False, False, True, True]


def test_small_products_have_small_blocks():
    """So that most multiprocessors have one, and narrow weights no block of which half lies beyond them."""
    tiles = card_for((9, 0)).tiles["half"]

    def rows(n_row, n_out):
        return tiles.for_rows(RowsWork("half", 8, n_row, n_out, 1024, 2, True, False, False), 132)

    def weights(n_out, add=False):
        return tiles.for_weights(WeightsWork("half", 8, 4096, n_out, 1024, 2, False, True, add, True), 132)

    by_rows = [rows(n_row, 256) for n_row in (128, 512, 4096, 2**15)]
    assert by_rows == [tiles.few, tiles.some, tiles.some, tiles.many]
    assert rows(2**20, 128) == tiles.some
    assert rows(4096, 100) == tiles.odd
    assert [weights(n_out) for n_out in (256, 512, 100)] == [tiles.few_weights, tiles.weights, tiles.odd_weights]
    assert weights(512, add=True) == tiles.added_weights


def test_every_card_has_blocks():
    """A card that is not in the table takes the entry below it; no bfloat16 or TF32 before Ampere."""
    assert set(CAPABILITIES) <= set(CARDS)
    assert card_for((10, 3)).name == card_for((10, 0)).name
    assert card_for((12, 1)).shared_kib == 99
    torch.set_float32_matmul_precision("high")
    for capability in CARDS:
        for dtype in (torch.float16, torch.float32):
            assert precision_of(dtype, capability) in card_for(capability).tiles
