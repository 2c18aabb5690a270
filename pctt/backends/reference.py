"""The definition: every operation in torch, in fp32 or fp64, on the CPU or on CUDA.

Instructions become closures over preallocated buffers, so that running a program allocates nothing and costs
one Python call per instruction. A slot of one entry is bound as a matrix: torch.addmm is faster there than a
batched product of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pctt.activations import LEAKY_SLOPE
from pctt.backends import reference_maps
from pctt.backends.operations import BackendUnavailable, one_after_the_other
from pctt.energies import VARIANCE_FLOOR
from pctt.groups import Layout, layout
from pctt.network import Network
from pctt.program import LEARNING_STEP, Buffer, Instruction, Program, Slot

Call = Callable[[], object]
Scalars = Mapping[str, float]

aten = torch.ops.aten

ACTIVATE: dict[str, Callable[..., object]] = {
    "identity": lambda a, out: out.copy_(a),
    "tanh": torch.tanh,
    "relu": partial(torch.clamp_min, min=0.0),
    "leaky_relu": partial(aten.leaky_relu.out, negative_slope=LEAKY_SLOPE),
    "sigmoid": torch.sigmoid,
    "gelu": aten.gelu.out,
    "silu": aten.silu.out,
    "hard_tanh": partial(torch.clamp, min=-1.0, max=1.0),
    "softmax": partial(torch.softmax, dim=-1),
}

DERIVATIVE: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Call]] = {
    "identity": lambda out, v, z, y: partial(out.copy_, v),
    "tanh": lambda out, v, z, y: partial(aten.tanh_backward.grad_input, v, y, grad_input=out),
    "relu": lambda out, v, z, y: partial(aten.threshold_backward.grad_input, v, y, 0.0, grad_input=out),
    "leaky_relu": lambda out, v, z, y: partial(
        aten.leaky_relu_backward.grad_input, v, y, LEAKY_SLOPE, True, grad_input=out
    ),
    "sigmoid": lambda out, v, z, y: partial(aten.sigmoid_backward.grad_input, v, y, grad_input=out),
    "gelu": lambda out, v, z, y: partial(aten.gelu_backward.grad_input, v, z, grad_input=out),
    "silu": lambda out, v, z, y: partial(aten.silu_backward.grad_input, v, z, grad_input=out),
    "hard_tanh": lambda out, v, z, y: partial(
        aten.hardtanh_backward.grad_input, v, y, -1.0, 1.0, grad_input=out
    ),
    "softmax": lambda out, v, z, y: partial(
        aten._softmax_backward_data.out, v, y, -1, y.dtype, grad_input=out
    ),
}


class Reference:
    """The torch backend. device: a torch device, by default the CPU."""

    name = "reference"

    def __init__(self, dtype: torch.dtype, device: str | int | None = None) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"the reference backend computes in float32 or float64, got {dtype}; convert the weights."
            )
        self.dtype = dtype
        self._seed = 0
        self._generators: dict[int, torch.Generator] = {}
        self.device = torch.device("cpu" if device is None else device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise BackendUnavailable(
                f"device {device!r} was asked for, but torch sees no CUDA device; use device='cpu' or "
                "install a CUDA torch."
            )

    uniform = False
    whole_steps = False
    planned_rows = None

    def compile(
        self, net: Network, grouped: bool, write: Callable[[Layout], Program], batch_size: int
    ) -> tuple[Layout, Program]:
        del batch_size
        where = layout(net, grouped)
        return where, write(where)

    def rows(self, batch_size: int) -> int:
        return batch_size

    def begin(self, buffers: Mapping[str, Tensor], batch_size: int) -> None:
        pass

    def sequence(self, calls: list[Callable[[], None]]) -> Callable[[], None]:
        return one_after_the_other(calls)

    def allocate(self, buffer: Buffer, batch_size: int) -> Tensor:
        return torch.zeros(buffer.shape(batch_size), dtype=self.dtype, device=self.device)

    def bind(
        self, code: Iterable[Instruction], buffers: Mapping[str, Tensor], scalars: Scalars
    ) -> Callable[[], None]:
        return one_after_the_other([self._bind_one(instruction, buffers, scalars) for instruction in code])

    def write(self, buffer: Tensor, slot: Slot, values: Tensor) -> None:
        buffer[slot.start].copy_(values.detach())

    def send_ahead(self, buffer: Tensor, slot: Slot, values: Tensor) -> Callable[[], None]:
        return partial(self.write, buffer, slot, values)

    def read(self, buffer: Tensor, slot: Slot) -> Tensor:
        return buffer[slot.start : slot.stop].cpu().clone()

    def seed(self, seed: int) -> None:
        self._seed = seed
        self._generators.clear()

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _bind_one(self, instruction: Instruction, buffers: Mapping[str, Tensor], scalars: Scalars) -> Call:
        def tensor(slot: Slot) -> Tensor:
            buffer = buffers[slot.buffer]
            return buffer[slot.start] if slot.stop == slot.start + 1 else buffer[slot.start : slot.stop]

        outs = [tensor(slot) for slot in instruction.out]
        inputs = [tensor(slot) for slot in instruction.inputs]
        if instruction.op == "noise":
            return self._noise(instruction, outs[0], inputs[0], scalars)
        return OPERATIONS[instruction.op](instruction, outs, inputs, scalars)

    def _noise(self, instruction: Instruction, out: Tensor, a: Tensor, scalars: Scalars) -> Call:
        node = dict(instruction.options)["node"]
        draws = torch.empty_like(out)

        def run(factor: float) -> None:
            draws.normal_(generator=self._generator(node))
            torch.add(a, draws, alpha=factor, out=out)

        return _with_factor(instruction, scalars, run)

    def _generator(self, node: int) -> torch.Generator:
        if node not in self._generators:
            entropy = np.random.SeedSequence([self._seed, node]).generate_state(1, np.uint64)[0]
            self._generators[node] = torch.Generator(self.device).manual_seed(int(entropy >> np.uint64(1)))
        return self._generators[node]


# Each operation below takes the tensors of its slots, [B, D] or [n, B, D], and returns the call that runs it.
# A call whose factor is a named scalar looks it up when it runs; the others are bound whole.

Build = Callable[[Instruction, list[Tensor], list[Tensor], Scalars], Call]


def _with_factor(instruction: Instruction, scalars: Scalars, call: Callable[[float], object]) -> Call:
    scale, name = instruction.scale, instruction.scalar
    return partial(call, scale) if name is None else lambda: call(scale * scalars[name])


def _fill(instruction: Instruction, outs: list[Tensor], inputs: list[Tensor], scalars: Scalars) -> Call:
    return partial(outs[0].fill_, instruction.scale)


def _copy(instruction: Instruction, outs: list[Tensor], inputs: list[Tensor], scalars: Scalars) -> Call:
    if instruction.scale == 1.0 and instruction.scalar is None:
        return partial(outs[0].copy_, inputs[0])
    return _with_factor(instruction, scalars, lambda factor: torch.mul(inputs[0], factor, out=outs[0]))


def _add(instruction: Instruction, outs: list[Tensor], inputs: list[Tensor], scalars: Scalars) -> Call:
    (out,), (a, b) = outs, inputs
    if instruction.scalar is None:
        return partial(torch.add, a, b, alpha=instruction.scale, out=out)
    return _with_factor(instruction, scalars, lambda factor: torch.add(a, b, alpha=factor, out=out))


def _multiply(instruction: Instruction, outs: list[Tensor], inputs: list[Tensor], scalars: Scalars) -> Call:
    return partial(torch.mul, *inputs, out=outs[0])


def _activate(instruction: Instruction, outs: list[Tensor], inputs: list[Tensor], scalars: Scalars) -> Call:
    assert instruction.function is not None
    outs, inputs = _rows(instruction, outs), _rows(instruction, inputs)
    return partial(ACTIVATE[instruction.function], inputs[0], out=outs[0])


def _derivative(instruction: Instruction, outs: list[Tensor], inputs: list[Tensor], scalars: Scalars) -> Call:
    assert instruction.function is not None
    outs, inputs = _rows(instruction, outs), _rows(instruction, inputs)
    v, drive, value = inputs
    return DERIVATIVE[instruction.function](outs[0], v, drive, value)


def _rows(instruction: Instruction, tensors: list[Tensor]) -> list[Tensor]:
    """Samples of several rows as the rows they are: option `last`, units of a row."""
    last = dict(instruction.options).get("last")
    return tensors if last is None else [tensor.view(-1, last) for tensor in tensors]


def _positions(instruction: Instruction, tensor: Tensor) -> Tensor:
    """[B, positions units] as [B positions, units]"""
    positions = dict(instruction.options).get("positions", 1)
    return tensor if positions == 1 else tensor.view(-1, tensor.shape[-1] // positions)


def _product(instruction: Instruction, outs: list[Tensor], inputs: list[Tensor], scalars: Scalars) -> Call:
    a, weight, *addend = inputs
    return _matmul(instruction, outs[0], _positions(instruction, a), weight, addend, scalars)


def _product_transposed(
    instruction: Instruction, outs: list[Tensor], inputs: list[Tensor], scalars: Scalars
) -> Call:
    a, weight, *addend = inputs
    return _matmul(instruction, outs[0], _positions(instruction, a), weight.mT, addend, scalars)


def _matmul(
    instruction: Instruction, out: Tensor, a: Tensor, b: Tensor, addend: list[Tensor], scalars: Scalars
) -> Call:
    if instruction.op != "outer":
        is_row = addend and addend[0].shape[-1] != out.shape[-1]
        addend = addend if is_row else [_positions(instruction, tensor) for tensor in addend]
        out = _positions(instruction, out)
    if not addend and instruction.scale == 1.0 and instruction.scalar is None:
        return partial(torch.matmul, a, b, out=out)
    # beta=0 makes torch ignore the addend, whatever stands in it
    start, beta = (addend[0], 1.0) if addend else (out, 0.0)
    multiply = torch.addmm if a.dim() == 2 else torch.baddbmm
    if instruction.scalar is None:
        return partial(multiply, start, a, b, beta=beta, alpha=instruction.scale, out=out)
    return _with_factor(
        instruction, scalars, lambda factor: multiply(start, a, b, beta=beta, alpha=factor, out=out)
    )


def _outer(instruction: Instruction, outs: list[Tensor], inputs: list[Tensor], scalars: Scalars) -> Call:
    a, b, *addend = inputs
    a, b = _positions(instruction, a), _positions(instruction, b)
    return _matmul(instruction, outs[0], a.mT, b, addend, scalars)


def _column_sum(instruction: Instruction, outs: list[Tensor], inputs: list[Tensor], scalars: Scalars) -> Call:
    (out,), (a, *addend) = outs, inputs
    a = _positions(instruction, a)

    def run(factor: float) -> None:
        if addend:
            torch.add(addend[0], a.sum(-2, keepdim=True), alpha=factor, out=out)
            return
        torch.sum(a, -2, keepdim=True, out=out)
        out.mul_(factor)

    return _with_factor(instruction, scalars, run)


def _inner(instruction: Instruction, outs: list[Tensor], inputs: list[Tensor], scalars: Scalars) -> Call:
    out = outs[0].view(-1)
    a, b = (tensor.reshape(out.numel(), -1) for tensor in inputs)
    calls = [partial(torch.dot, a[index], b[index], out=out[index]) for index in range(out.numel())]

    def run() -> None:
        for call in calls:
            call()

    return run


def _cross_entropy(
    instruction: Instruction, outs: list[Tensor], inputs: list[Tensor], scalars: Scalars
) -> Call:
    activity, drive = inputs
    last = dict(instruction.options).get("last", drive.shape[-1])

    def run() -> None:
        logits = torch.log_softmax(drive.view(*drive.shape[:-1], -1, last), -1).view(drive.shape)
        terms = torch.xlogy(activity, activity) - activity * logits
        outs[0].copy_(terms.sum((-2, -1)).view_as(outs[0]))

    return run


def _clip(instruction: Instruction, outs: list[Tensor], inputs: list[Tensor], scalars: Scalars) -> Call:
    stacks = [out.view(-1, *out.shape[-2:]) for out in outs]

    def run() -> None:
        squares = sum((stack * stack).sum((-2, -1), keepdim=True) for stack in stacks)
        assert isinstance(squares, Tensor)
        factor = (instruction.scale / squares.sqrt().clamp_min(1e-30)).clamp_max(1.0)
        for stack in stacks:
            stack.mul_(factor)

    return run


def _sgd(instruction: Instruction, outs: list[Tensor], inputs: list[Tensor], scalars: Scalars) -> Call:
    (weight, *state), (gradient,), options = outs, inputs, dict(instruction.options)

    def run(rate: float) -> None:
        if options["weight_decay"]:
            gradient.add_(weight, alpha=options["weight_decay"])
        if state:
            state[0].mul_(options["momentum"]).add_(gradient)
        weight.add_(state[0] if state else gradient, alpha=-rate)

    return _with_factor(instruction, scalars, run)


def _adam(instruction: Instruction, outs: list[Tensor], inputs: list[Tensor], scalars: Scalars) -> Call:
    # torch's own fused kernel, which torch.optim.Adam(fused=True) calls: 0.18 ms for the 270,000 weights of
    # 784-256-256-10 on 2 cores, where the optimiser object takes 0.44 ms and the same arithmetic in
    # elementwise calls 0.64 ms.
    (weight, first, second), (gradient,) = outs, inputs
    kernel = getattr(torch, f"_fused_{instruction.op}_")
    options = dict(instruction.options)
    step = torch.zeros((), dtype=torch.float32, device=weight.device)
    counter = options.get("step", LEARNING_STEP)

    def run(rate: float) -> None:
        step.fill_(scalars[counter])
        kernel(
            [weight],
            [gradient],
            [first],
            [second],
            [],
            [step],
            lr=rate,
            beta1=options["beta1"],
            beta2=options["beta2"],
            weight_decay=options["weight_decay"],
            eps=options["epsilon"],
            amsgrad=False,
            maximize=False,
        )

    return _with_factor(instruction, scalars, run)


def _step_control(
    instruction: Instruction, outs: list[Tensor], inputs: list[Tensor], scalars: Scalars
) -> Call:
    (factor, accepted), tolerance = outs, dict(instruction.options)["tolerance"]
    units = sum(estimate.shape[-1] for estimate in inputs)

    def run(scale: float) -> None:
        squares = sum((estimate * estimate).sum(-1, keepdim=True) for estimate in inputs)
        assert isinstance(squares, Tensor)
        excess = scale * (squares / units).sqrt() / tolerance
        torch.le(excess, 1.0, out=accepted)
        factor.mul_((0.9 * excess.clamp_min(1e-30).rsqrt()).clamp(0.2, 5.0))

    return _with_factor(instruction, scalars, run)


def _variance(instruction: Instruction, outs: list[Tensor], inputs: list[Tensor], scalars: Scalars) -> Call:
    (variance, precision), (target,), options = outs, inputs, dict(instruction.options)

    def run() -> None:
        aim = target.mean(-1, keepdim=True) if options["scalar"] else target
        variance.add_(aim - variance, alpha=options["adaptation"]).clamp_min_(VARIANCE_FLOOR)
        torch.reciprocal(variance, out=precision)

    return run


OPERATIONS: dict[str, Build] = {
    "fill": _fill,
    "copy": _copy,
    "add": _add,
    "multiply": _multiply,
    "activate": _activate,
    "derivative": _derivative,
    "product": _product,
    "product_transposed": _product_transposed,
    "outer": _outer,
    "column_sum": _column_sum,
    "inner": _inner,
    "cross_entropy": _cross_entropy,
    "clip": _clip,
    "sgd": _sgd,
    "adam": _adam,
    "adamw": _adam,
    "step_control": _step_control,
    "variance": _variance,
    **reference_maps.OPERATIONS,
}
