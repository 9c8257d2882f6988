"""Uses, after LitGPT's imports, what they postpone; prints what it saw as JSON. Run by `test_lazy_imports`."""

import importlib
import json
import pickle
import sys

import litgpt.pretrain

import litgpt_moe_ext.attention.layer
import litgpt_moe_ext.moe.layer

BIG = (
    "torchvision", "transformers", "sklearn", "pandas", "scipy", "torch._dynamo", "torch._inductor",
    "torch.distributed.tensor", "triton.runtime.jit", "matplotlib",
)  # fmt: skip
report = {}

import torch  # noqa: E402
import torch.utils.flop_counter  # noqa: E402
import torchmetrics  # noqa: E402
from lightning import Fabric  # noqa: E402
from lightning.fabric import wrappers  # noqa: E402
from litgpt.generate import base  # noqa: E402
from torchmetrics.aggregation import MeanMetric  # noqa: E402

import litgpt_moe_ext.training.phases.equip  # noqa: E402, F401
from litgpt_moe_ext.host.without_compiler import bare_step, replace_step  # noqa: E402
from litgpt_moe_ext.training.compilation import CompileDecision, compile_scope  # noqa: E402

# A training step of a run that compiles nothing.
torch.manual_seed(0)
with compile_scope(CompileDecision(False, "test")):
    model = torch.nn.Linear(2, 2)
    eager = torch.compile(model)
    as_decorator = torch.compile(dynamic=True)(sorted)
    optimizer = torch.optim.AdamW(eager.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *_: report.setdefault("hooked", True))
    replace_step(optimizer, bare_step(optimizer))
    eager(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
report["stepped"] = [model.weight.tolist(), model.weight.requires_grad]
report["left alone"] = [eager is model, as_decorator is sorted]
report["loaded"] = [name for name in BIG if name in sys.modules]

# Before torch's compiler is loaded.
plain = torch.nn.Linear(2, 2)
report["nothing is compiled"] = [
    isinstance(plain, wrappers.OptimizedModule),
    wrappers.is_wrapped(plain),
    wrappers.is_wrapped(Fabric(accelerator="cpu", devices=1).setup(plain)),
]
# torch 2.10 does not ask.
report["no Triton function"] = isinstance(sorted, getattr(torch.utils.flop_counter, "_JITFunction", type(None)))
report["sample"] = base.multinomial_num_samples_1(torch.tensor([0.0, 1.0, 0.0])).item()
report["version"] = torchmetrics.__version__
report["one class"] = [
    torchmetrics.Metric.__module__,
    issubclass(MeanMetric, torchmetrics.Metric),
    litgpt.pretrain.RunningMean is torchmetrics.RunningMean,
    isinstance(pickle.loads(pickle.dumps(MeanMetric())), torchmetrics.Metric),
]

mean = MeanMetric()
mean.update(torch.tensor([1.0, 3.0]))
figure, axes = mean.plot()
report["plot"] = [type(figure).__name__, type(axes).__name__, torchmetrics.utilities.plot.plt is not None]

# A name, then a submodule, that no import of LitGPT needs.
accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=3)
accuracy.update(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 2]))
report["accuracy"] = [accuracy.compute().item(), pickle.loads(pickle.dumps(accuracy)).compute().item()]
report["functional"] = torchmetrics.functional.accuracy(
    torch.tensor([0, 1]), torch.tensor([0, 0]), task="binary"
).item()
report["names"] = sorted(name for name in vars(torchmetrics) if not name.startswith("__"))
report["public"] = [name for name in torchmetrics.__all__ if not hasattr(torchmetrics, name)]
report["attributes"] = [name for name in ("__getattr__", "__dir__") if name in vars(torchmetrics)]
report["loader"] = [type(torchmetrics.__spec__.loader).__name__, "exec_module" in vars(torchmetrics.__spec__.loader)]
handlers = len(torchmetrics._logger.handlers)
report["handlers"] = handlers


class Own(torchmetrics.Metric):
    """A user's own metric."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0))

    def update(self, value: torch.Tensor) -> None:
        self.total += value.sum()

    def compute(self) -> torch.Tensor:
        return self.total


own = Own()
own.update(torch.ones(3))
report["own metric"] = [own.compute().item(), isinstance(own, torch.nn.Module), isinstance(own, torchmetrics.Metric)]
report["collection"] = torchmetrics.MetricCollection({"own": own}).compute()["own"].item()

from torchvision import ops  # noqa: E402
from transformers import AutoConfig, PretrainedConfig  # noqa: E402

report["others"] = [
    ops.nms(torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1]]), torch.tensor([0.5, 0.4]), 0.5).tolist(),
    issubclass(type(AutoConfig.for_model("gpt2")), PretrainedConfig),
]

# Once the compiler is loaded, the stand-ins are gone.
compiled = torch.compile(torch.nn.Linear(2, 2), backend="eager")
again = Fabric(accelerator="cpu", devices=1).setup(compiled)
report["compiled"] = [
    wrappers.OptimizedModule is torch._dynamo.OptimizedModule,
    isinstance(compiled, wrappers.OptimizedModule),
    isinstance(wrappers._unwrap_compiled(again)[0], wrappers._FabricModule),
    again(torch.zeros(1, 2)).shape == (1, 2),
    torch.compile(lambda x: x + torch._dynamo.is_compiling(), backend="eager")(torch.zeros(1)).item(),
    torch._inductor.config.coordinate_descent_tuning,
]
from triton.runtime.jit import JITFunction  # noqa: E402

report["Triton function"] = getattr(torch.utils.flop_counter, "_JITFunction", JITFunction) is JITFunction
reloaded = importlib.reload(torchmetrics)
report["reload"] = reloaded is torchmetrics and reloaded.Accuracy is not None

print("REPORT" + json.dumps(report))
