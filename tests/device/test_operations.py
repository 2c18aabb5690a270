"""Every card operation on the device and in the emulation, on the same random data, against fp64.

The oracle is plain torch in fp64 on the values as stored. Where the emulation knows the card's rounding
exactly, the two must agree bit for bit. Where they sum in another order or compute tanh and its like by
another polynomial, the device may be at most twice as far from fp64 as the emulation is, plus some units in
the last place, in the largest and in the root mean square distance. docs/numerics.md has the rules and what
was measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pctt.backends.emulated import Emulated
from pctt.backends.lowering import TILE, CardBuffer, Chain
from pctt.backends.placed import Placed
from pctt.backends.tenstorrent import Tenstorrent
from pctt.program import Instruction, Slot

ROWS, COUNT, COLUMNS = 32, 2, 2 * TILE
RATE = 0.1

F, B = "float32", "bfloat16"
UNIT = {F: 2.0**-23, B: 2.0**-7}
"""A unit in the last place of 1."""


@dataclass(frozen=True)
class Case:
    """One card operation.

    buffers: those it touches.    data: values of the buffers it reads, and perhaps of its output.
    expected: its result in fp64, [count, rows, columns], from the stored values by buffer name.
    ulps: by how many units in the last place of fp32, at the size of the largest result, device and emulation
        may differ. None: not at all.
    """

    instruction: Instruction
    buffers: tuple[CardBuffer, ...]
    data: Mapping[str, Tensor]
    expected: Callable[[dict[str, Tensor]], Tensor]
    ulps: float | None = None


@pytest.fixture(scope="module")
def card(device: Any) -> Tenstorrent:
    return Tenstorrent(torch.float32)


@pytest.fixture(scope="module")
def emulated(card: Tenstorrent) -> Emulated:
    return Emulated(torch.float32, card.chip.name)


def run(backend: Placed, case: Case) -> Tensor:
    """The output of a case in fp64; of a tensor of one row only that."""
    backend._buffers = {buffer.name: buffer for buffer in case.buffers}
    backend.planned_rows = ROWS
    buffers: dict[str, Any] = {b.name: backend.allocate(b, ROWS) for b in case.buffers}
    for name, values in case.data.items():
        rows, columns = (size * TILE for size in backend.buffer(name).tiles(ROWS))
        for index, entry in enumerate(values):
            padded = torch.zeros(rows, columns)
            padded[: entry.shape[0], : entry.shape[1]] = entry
            backend.put(buffers[name], backend.buffer(name), index, padded)
    backend.bind([case.instruction], buffers, {"rate": RATE})()
    out = case.instruction.out[0]
    values = backend.get(buffers[out.buffer], out.start, out.stop).double()
    return values[:, : backend.buffer(out.buffer).rows]


def stored(values: Tensor, form: str) -> Tensor:
    return (values.bfloat16() if form == B else values).double()


def rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def largest(values: Tensor) -> float:
    return values.abs().max().item()


def check(card: Placed, emulated: Placed, case: Case) -> None:
    """Raises AssertionError with the distances where the device or the emulation is too far off."""
    form = {buffer.name: buffer.format for buffer in case.buffers}
    values = {name: stored(entry, form[name]) for name, entry in case.data.items()}
    expected = case.expected(values)
    found, emulation = run(card, case), run(emulated, case)
    assert found.shape == emulation.shape == expected.shape
    # Each of a handful of roundings costs half a unit of the coarsest format, at the size of what it rounds.
    coarsest = UNIT[B] if B in form.values() else UNIT[F]
    sizes = max(largest(expected), *(largest(entry) for entry in values.values()))
    gross = 4.0 * coarsest * sizes
    assert largest(emulation - expected) <= gross, f"emulation off by {largest(emulation - expected):.1e}"
    if case.ulps is None:
        assert torch.equal(found, emulation), (
            f"{(found != emulation).double().mean():.1%} of the results differ from the emulation's, by "
            f"up to {largest(found - emulation):.2e}; the device is {largest(found - expected):.2e} from fp64"
        )
        return
    for measure in (largest, rms):
        floor = case.ulps * UNIT[F] * measure(expected)
        distance, own = measure(found - expected), measure(emulation - expected)
        between = measure(found - emulation)
        assert distance <= 2.0 * own + floor, f"{measure.__name__}: {distance:.2e}, emulation {own:.2e}"
        assert between <= 3.0 * own + floor, f"{measure.__name__} between the two: {between:.2e}"


# --- building cases -----------------------------------------------------------------------------------------


def tensor(
    name: str,
    form: str = F,
    first: int | None = 0,
    rows: int = ROWS,
    columns: int = COLUMNS,
    count: int = COUNT,
) -> CardBuffer:
    return CardBuffer(f"{name}@nodes0", count, rows, columns, form, first)


NUMBERS = {
    form: CardBuffer(f"{form}@scalars", 1, 1, 1, form, first=None, scalar=(1.0, "rate", ()))
    for form in (F, B)
}
NUMBER = {form: stored(torch.tensor(RATE), form) for form in (F, B)}
"""The number RATE on the card, by its format, and its value there."""


def whole(buffer: CardBuffer) -> Slot:
    return Slot(buffer.name, 0, buffer.count)


def draw(buffer: CardBuffer, seed: int, positive: bool = False) -> Tensor:
    """Normal numbers times 2^-4 to 2^3, [count, rows, columns]; `positive` ones also stay away from 0."""
    source = torch.Generator().manual_seed(seed)
    shape = buffer.count, buffer.rows, buffer.columns
    scale = torch.exp2(torch.randint(-4, 4, shape, generator=source).float())
    values = torch.randn(shape, generator=source) * scale
    return values.abs() + 2.0**-6 if positive else values


ORACLE: dict[str, Callable[..., Tensor]] = {
    "tanh": torch.tanh,
    "relu": lambda a: a.clamp(min=0.0),
    "leaky_relu": lambda a, slope: a.clamp(min=0.0) + slope * a.clamp(max=0.0),
    "sigmoid": lambda a: 1.0 / (1.0 + torch.exp(-a)),
    "silu": lambda a: a / (1.0 + torch.exp(-a)),
    "clamp": lambda a, low, high: torch.minimum(torch.maximum(a, a.new_tensor(low)), a.new_tensor(high)),
    "erf": torch.special.erf,
    "exp": torch.exp,
    "square": lambda a: a * a,
    "sqrt": lambda a: a**0.5,
    "reciprocal": lambda a: 1.0 / a,
    "above_zero": lambda a: torch.heaviside(a, a.new_zeros(())),
    "add": lambda a, constant: a + constant,
    "multiply": lambda a, constant: a * constant,
    "subtract_from": lambda a, constant: constant - a,
}
PARAMETERS: dict[str, tuple[float, ...]] = {
    **{"leaky_relu": (0.01,), "clamp": (-1.0, 1.0), "add": (0.5,), "multiply": (0.3,)},
    "subtract_from": (1.0,),
}
# Units in the last place of fp32 by which the device's polynomials may be off at the largest result.
# Measured: at most 1.5 for all but erf, 3 for erf.
ULPS: dict[str, float] = {
    **dict.fromkeys(("tanh", "sigmoid", "silu", "exp", "sqrt", "reciprocal"), 1.0),
    "erf": 3.0,
}
COMBINE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
}


def link(name: str) -> Chain:
    """The function as a chain; exp of an eighth, whose results then stay within the range of the others."""
    own = (name, *PARAMETERS.get(name, ()))
    return (("multiply", 0.125), own) if name == "exp" else (own,)


SLOPE: Chain = (("square",), ("subtract_from", 1.0))  # tanh' as a function of tanh


def apply(values: Tensor, chain: Chain) -> Tensor:
    for name, *parameters in chain:
        values = ORACLE[name](values, *parameters)
    return values


def binary(
    function: str,
    a: CardBuffer,
    b: CardBuffer | None,
    out: CardBuffer,
    positive: bool = False,
    ulps: float | None = None,
    **chains: Chain,
) -> Case:
    """out = out_chain(a_chain(a) function b_chain(b)); b may have one row; without one it is the number,
    in the format of out.
    """
    inputs = (a,) if b is None else (a, b)
    scalar = NUMBERS[out.format].name if b is None else None
    instruction = Instruction(
        *("binary", (whole(out),), tuple(whole(x) for x in inputs)),
        scalar=scalar,
        function=function,
        options=tuple(chains.items()),
    )

    def expected(values: dict[str, Tensor]) -> Tensor:
        first = apply(values[a.name], chains.get("a_chain", ()))
        second = NUMBER[out.format] if b is None else apply(values[b.name], chains.get("b_chain", ()))
        return apply(COMBINE[function](first, second), chains.get("out_chain", ()))

    data = {x.name: draw(x, seed, positive) for seed, x in enumerate(inputs)}
    return Case(instruction, (*inputs, out, *NUMBERS.values()), data, expected, ulps)


def unary(
    a: CardBuffer, out: CardBuffer, chain: Chain = (), positive: bool = False, ulps: float | None = None
) -> Case:
    options = (("chain", chain),) if chain else ()
    instruction = Instruction("unary", (whole(out),), (whole(a),), options=options)
    data = {a.name: draw(a, 1, positive)}
    return Case(instruction, (a, out), data, lambda values: apply(values[a.name], chain), ulps)


# --- functions of one tensor --------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["alone", "on the operands", "on the result"])
@pytest.mark.parametrize("name", ORACLE)
def test_a_function_of_a_chain_is_the_same_on_the_device(
    card: Tenstorrent, emulated: Emulated, name: str, place: str
) -> None:
    """In fp32, in every place where a chain may stand. A wrong parameter or a fast approximation would bend
    every activation a little, and training would still run.
    """
    positive, ulps = name in ("sqrt", "reciprocal"), ULPS.get(name)
    a, b, out = tensor("a"), tensor("b"), tensor("o")
    if place == "alone":
        case = unary(a, out, link(name), positive, ulps)
    elif place == "on the operands":
        twice = None if ulps is None else 2.0 * ulps
        chains = {"a_chain": link(name), "b_chain": link(name)}
        case = binary("multiply", a, b, out, positive, twice, **chains)
    else:
        case = binary("add", a, b, out, positive, ulps, out_chain=link(name))
    check(card, emulated, case)


def test_tanh_of_a_small_number_keeps_its_relative_precision(card: Tenstorrent) -> None:
    """tanh(x) = x for |x| < 2^-12 to fp32's precision. A polynomial with a constant term, or a table, would
    round away the deviations near the input of a deep chain, which are as small as 1e-12.
    """
    a, out = tensor("a"), tensor("out")
    case = unary(a, out, link("tanh"))
    small = draw(a, 3).sign() * torch.exp2(-torch.linspace(12.0, 60.0, COLUMNS)).expand(COUNT, ROWS, COLUMNS)
    found = run(card, Case(case.instruction, case.buffers, {a.name: small.contiguous()}, case.expected))
    relative = (found - small.double()) / small.double()
    assert largest(relative) <= 4 * UNIT[F], f"off by {largest(relative):.1e} of the value"


# --- formats ------------------------------------------------------------------------------------------------

TRIPLES = list(itertools.product((F, B), repeat=3))


def names(formats: tuple[str, ...]) -> str:
    return "-".join("fp32" if form == F else "bf16" for form in formats)


@pytest.mark.parametrize("formats", TRIPLES, ids=names)
@pytest.mark.parametrize("function", COMBINE)
def test_a_binary_operation_rounds_as_the_emulation_says(
    card: Tenstorrent, emulated: Emulated, function: str, formats: tuple[str, ...]
) -> None:
    """Bit for bit, for every choice of formats: sums of other than fp32 pairs go through the matrix unit,
    which aligns the operands at 10 bits of mantissa.
    """
    a, b, out = (tensor(name, form) for name, form in zip("abo", formats, strict=True))
    check(card, emulated, binary(function, a, b, out))


@pytest.mark.parametrize("formats", [(F, B, B), (B, F, B), (B, B, F), (B, B, B)], ids=names)
@pytest.mark.parametrize(
    ("function", "chains"),
    [("multiply", {"a_chain": SLOPE}), ("add", {"b_chain": link("multiply")}), ("add", {"out_chain": SLOPE})],
    ids=["gate", "scaled sum", "slope of a sum"],
)
def test_chains_round_as_the_emulation_says(
    card: Tenstorrent,
    emulated: Emulated,
    function: str,
    chains: dict[str, Chain],
    formats: tuple[str, ...],
) -> None:
    """Bit for bit: what a chain leaves of a bfloat16 operand is bfloat16 again."""
    a, b, out = (tensor(name, form) for name, form in zip("abo", formats, strict=True))
    check(card, emulated, binary(function, a, b, out, **chains))


@pytest.mark.parametrize("name", ["square", "add", "multiply", "subtract_from", "leaky_relu"])
def test_a_function_within_bfloat16_rounds_as_the_emulation_says(
    card: Tenstorrent, emulated: Emulated, name: str
) -> None:
    """Bit for bit: some to nearest, some towards zero."""
    check(card, emulated, unary(tensor("a", B), tensor("o", B), link(name)))


@pytest.mark.parametrize("first", [0, 1], ids=["same core", "next core"])
@pytest.mark.parametrize("formats", list(itertools.product((F, B), repeat=2)), ids=names)
def test_a_change_of_format_rounds_to_nearest(
    card: Tenstorrent, emulated: Emulated, formats: tuple[str, ...], first: int
) -> None:
    """Bit for bit, ties to even. Cut, every master weight would shrink by half a unit of bfloat16 on average
    on its way to the products.
    """
    a, out = tensor("a", formats[0]), tensor("o", formats[1], first)
    check(card, emulated, unary(a, out))


# --- one row, a number, other cores -------------------------------------------------------------------------


@pytest.mark.parametrize("formats", [(F, F, F), (B, F, F), (B, F, B), (B, B, B)], ids=names)
@pytest.mark.parametrize("function", ["add", "multiply"])
def test_an_operand_of_one_row_serves_all_rows(
    card: Tenstorrent, emulated: Emulated, function: str, formats: tuple[str, ...]
) -> None:
    """Biases and precisions."""
    a, out = tensor("a", formats[0]), tensor("o", formats[2])
    check(card, emulated, binary(function, a, tensor("b", formats[1], rows=1), out))


@pytest.mark.parametrize("formats", [(F, F), (B, B)], ids=names)
@pytest.mark.parametrize("function", ["add", "multiply"])
def test_a_number_on_the_card_is_an_operand(
    card: Tenstorrent, emulated: Emulated, function: str, formats: tuple[str, ...]
) -> None:
    """The factor of gradients and the epsilon of Adam."""
    a, out = tensor("a", formats[0]), tensor("o", formats[1])
    check(card, emulated, binary(function, a, None, out, positive=True))


def test_the_root_and_inverse_of_adam(card: Tenstorrent, emulated: Emulated) -> None:
    chains: dict[str, Chain] = {"a_chain": link("sqrt"), "out_chain": link("reciprocal")}
    check(card, emulated, binary("add", tensor("a"), None, tensor("o"), True, ulps=2.0, **chains))


@pytest.mark.parametrize("places", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (2, 1, 0)], ids=str)
def test_operands_on_other_cores(card: Tenstorrent, emulated: Emulated, places: tuple[int, int, int]) -> None:
    """The elementwise operation carries the data from core to core."""
    a, b, out = (tensor(name, first=place) for name, place in zip("abo", places, strict=True))
    check(card, emulated, binary("subtract", a, b, out, out_chain=SLOPE))


@pytest.mark.parametrize("first", [0, 1], ids=["same core", "next core"])
@pytest.mark.parametrize("form", [F, B])
def test_addcmul_with_a_number(card: Tenstorrent, emulated: Emulated, form: str, first: int) -> None:
    """a + s b. Torch fuses the two roundings and the device does not, so one unit of the sum."""
    a, b, out = tensor("a", form), tensor("b", form, first), tensor("o", form)
    number = NUMBERS[form]
    instruction = Instruction("addcmul", (whole(out),), (whole(a), whole(b)), scalar=number.name)
    case = Case(
        *(instruction, (a, b, out, number), {a.name: draw(a, 1), b.name: draw(b, 2)}),
        lambda values: values[a.name] + NUMBER[form] * values[b.name],
        ulps=UNIT[form] / UNIT[F],
    )
    check(card, emulated, case)


# --- products, transposes, sums, fills ----------------------------------------------------------------------


def matmul(a: CardBuffer, b: CardBuffer, out: CardBuffer) -> Case:
    instruction = Instruction("matmul", (whole(out),), (whole(a), whole(b)))
    source = torch.Generator().manual_seed(1)
    data = {
        buffer.name: torch.randn(buffer.count, buffer.rows, buffer.columns, generator=source)
        for buffer in (a, b)
    }
    return Case(instruction, (a, b, out), data, lambda values: values[a.name] @ values[b.name])


def check_product(card: Tenstorrent, emulated: Emulated, case: Case) -> None:
    """The matrix unit adds products in groups of eight, each rounded to a multiple of 2^-10 of the power of
    two below the largest product m of its group: by up to 2^-11 m, in the root mean square 2^-11 m / sqrt 3.
    At HiFi3 it also leaves out the product of the lowest bits of the operands, up to 2^-10 of a product. The
    emulation knows neither. What else the two do to the operands must agree: a bit more or less of one, or
    another fidelity, moves results by ten times as much.
    """
    a, b, out = case.buffers
    values = {x.name: stored(case.data[x.name], x.format) for x in (a, b)}
    expected = case.expected(values)
    found, emulation = run(card, case), run(emulated, case)
    terms = values[a.name].abs()[:, :, :, None] * values[b.name].abs()[:, None]
    groups = terms.unflatten(2, (-1, 8)).amax(3)  # [count, rows, groups, columns]
    sizes = values[a.name].abs() @ values[b.name].abs()
    roundings = 2.0**-11 * (8.0 * groups.square().sum(2) / 3.0).sqrt()
    left_out = 2.0**-10 * sizes
    stores = UNIT[out.format] * expected.abs()
    between = found - emulation
    assert (between.abs() <= 8 * 2.0**-11 * groups.sum(2) + left_out + stores).all()
    allowed = rms(roundings) + rms(stores) + 2.0**-12 * rms(expected)
    assert rms(between) <= allowed, f"{rms(between):.2e} between device and emulation, allowed {allowed:.2e}"
    # Cut to 9 or 10 bits, operands are small by 2^-10 and 2^-11 on average; bfloat16 has fewer bits.
    cuts = sum(unit for x, unit in ((a, 2.0**-10), (b, 2.0**-9)) if x.format == F)
    distance = rms(found - expected)
    assert distance <= allowed + cuts * rms(expected), f"{distance:.2e} from fp64"


@pytest.mark.parametrize("formats", TRIPLES, ids=names)
def test_a_product_cuts_its_operands_as_the_emulation_says(
    card: Tenstorrent, emulated: Emulated, formats: tuple[str, ...]
) -> None:
    a = tensor("a", formats[0], 1)
    b = tensor("b", formats[1], 1, rows=COLUMNS, columns=3 * TILE)
    check_product(card, emulated, matmul(a, b, tensor("o", formats[2], 1, columns=3 * TILE)))


def test_a_product_with_a_row_of_ones_sums_columns(card: Tenstorrent, emulated: Emulated) -> None:
    """Gradients of biases; what lies below the row of ones must not count."""
    a = tensor("a", B, rows=1, columns=ROWS)
    case = matmul(a, tensor("b", B), tensor("o", rows=1))
    ones = {a.name: torch.ones(COUNT, 1, ROWS)}
    check_product(card, emulated, replace(case, data={**case.data, **ones}))


@pytest.mark.parametrize("form", [F, B])
@pytest.mark.parametrize(
    ("first", "out_first"),
    [(1, 0), (0, 1), (2, 3), (0, 0), (2, 2), (None, None), (1, None), (None, 1)],
    ids=str,
)
def test_a_transpose_is_exact(
    card: Tenstorrent, emulated: Emulated, first: int | None, out_first: int | None, form: str
) -> None:
    """Also onto the cores where it comes from."""
    count = 1 if None in (first, out_first) else COUNT
    a = tensor("a", form, first, count=count)
    out = tensor("o", form, out_first, rows=COLUMNS, columns=ROWS, count=count)
    instruction = Instruction("transpose", (whole(out),), (whole(a),))
    case = Case(instruction, (a, out), {a.name: draw(a, 1)}, lambda values: values[a.name].mT)
    check(card, emulated, case)


@pytest.mark.parametrize("first", [0, 2, None], ids=["from core 0", "from core 2", "spread"])
def test_sums_over_rows(card: Tenstorrent, emulated: Emulated, first: int | None) -> None:
    """Energies. Through bfloat16 or TF32 they would be off by 2^-9 or 2^-11, thousands of units."""
    count = 1 if first is None else COUNT
    a, out = tensor("a", first=first, count=count), tensor("o", first=first, rows=1, count=count)
    instruction = Instruction("row_sums", (whole(out),), (whole(a),))
    data = {a.name: draw(a, 1, positive=True)}
    case = Case(instruction, (a, out), data, lambda values: values[a.name].sum(1, keepdim=True), ulps=8.0)
    check(card, emulated, case)


@pytest.mark.parametrize("form", [F, B])
@pytest.mark.parametrize("first", [1, None], ids=["on cores", "spread"])
def test_a_fill_clears_what_is_not_a_number(
    card: Tenstorrent, emulated: Emulated, first: int | None, form: str
) -> None:
    """A product with zero would leave NaN, and one bad batch would spoil all that follow."""
    out = tensor("o", form, first, count=1 if first is None else COUNT)
    instruction = Instruction("fill", (whole(out),), scale=0.0)
    data = {out.name: torch.full((out.count, ROWS, COLUMNS), float("nan"))}
    for backend in (card, emulated):
        found = run(backend, Case(instruction, (out,), data, lambda values: values[out.name]))
        assert torch.equal(found, torch.zeros_like(found)), backend.name


# --- layers whose tiles are spread over the cores -----------------------------------------------------------

SPREAD = [(None, None, None), (0, 0, None), (None, None, 1), (None, 2, None), (1, None, 0)]


@pytest.mark.parametrize("places", SPREAD, ids=str)
def test_binary_operations_between_spread_tensors_and_cores(
    card: Tenstorrent, emulated: Emulated, places: tuple[int | None, ...]
) -> None:
    a, b, out = (tensor(name, first=place, count=1) for name, place in zip("abo", places, strict=True))
    check(card, emulated, binary("subtract", a, b, out, a_chain=SLOPE))


@pytest.mark.parametrize("formats", list(itertools.product((F, B), repeat=2)), ids=names)
@pytest.mark.parametrize("places", [(None, None), (1, None), (None, 1)], ids=str)
def test_changes_of_format_between_spread_tensors_and_cores(
    card: Tenstorrent, emulated: Emulated, places: tuple[int | None, int | None], formats: tuple[str, str]
) -> None:
    a, out = (
        tensor(name, form, place, count=1) for name, form, place in zip("ao", formats, places, strict=True)
    )
    check(card, emulated, unary(a, out))


@pytest.mark.parametrize("places", [(None, None), (1, None), (None, 1)], ids=str)
def test_functions_between_spread_tensors_and_cores(
    card: Tenstorrent, emulated: Emulated, places: tuple[int | None, int | None]
) -> None:
    a, out = (tensor(name, first=place, count=1) for name, place in zip("ao", places, strict=True))
    check(card, emulated, unary(a, out, SLOPE))


@pytest.mark.parametrize("shape", [(32, 64, 96), (32, 96, 2560), (160, 32, 64)], ids=str)
@pytest.mark.parametrize("formats", [(B, B, F), (F, F, F)], ids=names)
def test_products_of_spread_tensors(
    card: Tenstorrent, emulated: Emulated, formats: tuple[str, ...], shape: tuple[int, int, int]
) -> None:
    """Fewer tiles of result than cores, more, and more rows than columns."""
    rows, depth, columns = shape
    a = tensor("a", formats[0], None, rows, depth, count=1)
    b = tensor("b", formats[1], None, depth, columns, count=1)
    check_product(card, emulated, matmul(a, b, tensor("o", formats[2], None, rows, columns, count=1)))
