"""Reads a torch module through torch.fx and makes values of what it computes. What each module, function and
method of torch becomes stands in `translate/tables.py`.
"""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from pctt.layers.maps import Concat, Map, Permute, Reshape, Shape, Slice
from pctt.translate.graph import VIEWS, Reference, Value

Handler = Callable[..., Any]


class BatchSize:
    """What the module sees as the size of the batch axis: no number while it is translated."""

    def __repr__(self) -> str:
        return "the batch size"


BATCH = BatchSize()


class Absent:
    """A result that the translation does not have, such as the shares of an attention; asking for it is
    refused.
    """

    def __init__(self, what: str) -> None:
        self.what = what


class Unsupported(ValueError):
    """what: cannot be translated.    advice: what to do."""

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(what)
        self.what, self.advice = what, advice


class _Tracer(fx.Tracer):
    record_stack_traces = True


class Translator:
    """One walk over a traced module.

    module: as the user has it.    shapes: of a sample of each input, None where unknown.
    handlers: (by type of module, by function, by name of method).
    """

    def __init__(
        self,
        module: nn.Module,
        shapes: Sequence[Shape] | None,
        handlers: tuple[Mapping[type, Handler], Mapping[Any, Handler], Mapping[str, Handler]],
    ) -> None:
        self.module, self.shapes = module, shapes
        self.modules, self.functions, self.methods = handlers
        self.roots: list[Value] = []
        self.path = self.name = ""
        self._count = self._group = self._constants = 0
        tensors: list[tuple[str, Tensor]] = list(module.named_parameters(remove_duplicate=False))
        tensors += module.named_buffers(remove_duplicate=False)
        self.state: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}
        for name, tensor in tensors:
            if id(tensor) not in self._names:
                self._names[id(tensor)] = name
                self.state[name] = tensor

    # --- what handlers use ----------------------------------------------------------------------------------

    def apply(
        self, map_: Map, *values: Value, label: str = "", ends: bool = False, **params: Reference | None
    ) -> Value:
        """The value that a map makes of others. Raises Unsupported where it does not suit them."""
        for value in values:
            if not isinstance(value, Value):
                refuse(
                    f"{map_.kind} of {_described(value)}",
                    "let it read what is computed from the module's inputs.",
                )
            if not value.shape:
                refuse("one number per sample", "keep its axis: x[:, :1], keepdim=True.")
        try:
            shape = map_.output_shape([value.shape for value in values])
        except ValueError as error:
            refuse(f"{map_.kind}: {error}", "bring the operands to the shapes that the map takes.")
        given = {key: reference for key, reference in params.items() if reference is not None}
        if given and not label:
            first = min(reference.name for reference in given.values())
            label = first.rpartition(".")[0] or first
        self._count += 1
        return Value(
            shape, self._count, map_, values, given, self._group, self.name, label or self.name, ends
        )

    def part(self, name: str) -> None:
        """What follows is an operation of its own, part of a larger module."""
        self._group += 1
        self.name = f"{self.path}.{name}" if self.path else name

    def reference(self, tensor: Any) -> Reference | None:
        """Of a parameter or buffer of the module; None for None."""
        if tensor is None or isinstance(tensor, Reference):
            return tensor
        if not isinstance(tensor, Tensor):
            refuse(f"a weight that is {_described(tensor)}", "use a parameter of the module.")
        name = self._names.get(id(tensor))
        if name is None:
            refuse(
                "a weight that is no parameter of the module",
                "remove weight normalisation and other reparametrisations first.",
            )
        return Reference(name, tensor.detach())

    def constant(self, tensor: Tensor) -> Reference:
        """Of numbers that no gradient moves."""
        self._constants += 1
        return Reference(f"*{self._constants}", tensor.detach())

    def reshape(self, value: Value, shape: Shape) -> Value:
        if shape == value.shape:
            return value
        if not shape:
            refuse("one number per sample", "keep its axis: x[:, :1], keepdim=True.")
        if isinstance(value.map, Reshape) and value.inputs[0].shape == shape:
            return value.inputs[0]
        return self.apply(Reshape(shape), value)

    def permute(self, value: Value, axes: tuple[int, ...]) -> Value:
        if axes == tuple(range(len(axes))):
            return value
        if isinstance(value.map, Permute) and all(value.map.axes[a] == n for n, a in enumerate(axes)):
            return value.inputs[0]
        return self.apply(Permute(axes), value)

    def slice(self, value: Value, axis: int, start: int, stop: int) -> Value:
        """Entries start to stop of an axis of a sample."""
        if start == 0 and stop == value.shape[axis]:
            return value
        if isinstance(value.map, Concat) and value.map.axis == axis:
            place = 0
            for part in value.inputs:
                if (start, stop) == (place, place + part.shape[axis]):
                    return part
                place += part.shape[axis]
        return self.apply(Slice(start, stop, axis), value)

    def select(self, value: Value, axis: int, place: int) -> Value:
        """One entry of an axis, which goes. Nodes have an axis at least, so where it is the only one, nothing
        but an embedding can read the result.
        """
        part = self.slice(value, axis, place, place + 1)
        if len(part.shape) == 1:
            return replace(self.apply(Reshape((1,)), part) if part.map is None else part, shape=())
        return self.reshape(part, (*part.shape[:axis], *part.shape[axis + 1 :]))

    def axis(self, value: Value, dim: Any) -> int:
        """The axis of a sample that torch's `dim` is; raises Unsupported for the batch axis."""
        axes = len(value.shape) + 1
        if not isinstance(dim, int) or not -axes <= dim < axes:
            refuse(f"dim={dim!r}", f"use a whole number from 1 to {axes - 1}.")
        if dim % axes == 0:
            refuse("an operation over the batch axis", "samples must not mix; use another axis.")
        return dim % axes - 1

    def call(self, function: Any, *arguments: Any, **options: Any) -> Any:
        """What a function or module of torch becomes, found in the tables."""
        is_module = isinstance(function, nn.Module)
        if is_module and any(vars(function).get(name) for name in ("_forward_hooks", "_forward_pre_hooks")):
            refuse(f"{type(function).__name__} with forward hooks", "remove the hooks first.")
        name = type(function).__name__ if is_module else getattr(function, "__name__", repr(function))
        handler = self.modules.get(type(function)) if is_module else self.functions.get(function)
        if handler is None:
            refuse(name, ADVICE)
        given = (function, *arguments) if is_module else arguments
        return self._handled(name, handler, given, options)

    def _handled(self, name: str, handler: Handler, arguments: Any, options: Any) -> Any:
        try:
            inspect.signature(handler).bind(self, *arguments, **options)
        except TypeError as error:
            refuse(f"{name} with these arguments ({error})", "use its plain form.")
        return handler(self, *arguments, **options)

    # --- the walk -------------------------------------------------------------------------------------------

    def run(self) -> Value:
        """The output of the module."""
        traced = self._traced()
        found: dict[fx.Node, Any] = {}
        for node in traced.nodes:
            self._group += 1
            self.path = node.target if node.op == "call_module" else ""
            if self._wrapped:
                self.path = self.path.removeprefix("0").removeprefix(".")
            self.name = self.path or (type(self.module).__name__.lower() if self._wrapped else node.name)
            try:
                found[node] = self._step(node, found)
            except Unsupported as error:
                raise ValueError(self._message(node, error)) from None
            if node.op == "output":
                return found[node]
        raise AssertionError("a traced module has an output")

    def _traced(self) -> fx.Graph:
        tracer = _Tracer()
        self._wrapped = tracer.is_leaf_module(self.module, "")
        self._root = nn.Sequential(self.module) if self._wrapped else self.module
        try:
            return tracer.trace(self._root)
        except Exception as error:
            raise ValueError(
                f"torch.fx cannot trace {type(self.module).__name__} ({error}); use no control flow that "
                "depends on activities, loop over whole numbers that the module has, and make zeros by "
                "x.new_zeros(...)."
            ) from error

    def _step(self, node: fx.Node, found: dict[fx.Node, Any]) -> Any:
        if node.op == "placeholder":
            return self._input(node)
        if node.op == "get_attr":
            return self._attribute(str(node.target))
        arguments = fx.map_arg(node.args, lambda entry: found[entry])
        options = dict(fx.map_arg(node.kwargs, lambda entry: found[entry]))
        if node.op == "output":
            return self._output(arguments[0])
        self._check_in_place(node)
        function: Any = node.target
        if function in (getattr, operator.getitem) and isinstance(arguments[0], (tuple, list)):
            return function(*arguments)  # of sizes and of results that are tuples
        parts = _leaves((arguments, options))
        for part in parts:
            if isinstance(part, Absent):
                refuse(part.what, "do without it.")
        if node.op == "call_module":
            return self.call(self._root.get_submodule(str(node.target)), *arguments, **options)
        if not any(isinstance(part, (Value, Reference, BatchSize)) for part in parts):
            return self._fold(node, arguments, options)
        if not any(isinstance(part, (Value, BatchSize)) for part in parts):
            return self._view(node, arguments, options)
        if node.op == "call_method":
            name = str(node.target)
            handler = self.methods.get(name.rstrip("_") if name[-2:] != "__" else name)
            if handler is None or not isinstance(arguments[0], Value):
                refuse(f"{_described(arguments[0])}.{name}", ADVICE)
            return self._handled(name, handler, arguments, options)
        return self.call(node.target, *arguments, **options)

    def _input(self, node: fx.Node) -> Any:
        if node.args:
            return node.args[0]  # an argument with a default keeps it
        number = len(self.roots)
        name = "input" if number == 0 else str(node.target)
        shape = self._guessed(node) if self.shapes is None else None
        if self.shapes is not None:
            if number >= len(self.shapes):
                refuse(f"input {node.target!r} without a shape", "give one example per input of the module.")
            shape = self.shapes[number]
        self._count += 1
        assert shape is not None
        self.roots.append(Value(shape, self._count, name=name))
        return self.roots[-1]

    def _guessed(self, node: fx.Node) -> Shape:
        """The shape of an input that only linear modules read."""
        sizes: set[int] = set()
        for user in node.users:
            module = self._root.get_submodule(str(user.target)) if user.op == "call_module" else None
            sizes.add(module.in_features if isinstance(module, nn.Linear) else 0)
        if len(sizes) != 1 or 0 in sizes:
            refuse(
                f"input {node.target!r} of unknown shape",
                "give an example batch or the shape of a sample, from_torch(module, (3, 32, 32)).",
            )
        return (sizes.pop(),)

    def _attribute(self, target: str) -> Any:
        found: Any = self._root
        for part in target.split("."):
            found = getattr(found, part)
        return self.reference(found) if isinstance(found, nn.Parameter) else found

    def _output(self, result: Any) -> Value:
        if isinstance(result, Absent):
            refuse(result.what, "do without it.")
        if isinstance(result, Value) and not result.shape:
            refuse("an output of one number per sample", "keep its axis: [B, 1].")
        if not isinstance(result, Value):
            refuse(f"an output that is {_described(result)}", "let the module return one tensor.")
        if result.map is None:
            refuse("an output that is an input", "let the module compute something.")
        return result

    def _check_in_place(self, node: fx.Node) -> None:
        """Refuses a value that is overwritten and read afterwards: values here are never overwritten.

        torch.fx records `x += y` as `x + y`; what goes wrong by that shows in the output.
        """
        name = getattr(node.target, "__name__", str(node.target))
        in_place = bool(node.kwargs.get("inplace")) or (name.endswith("_") and not name.endswith("__"))
        in_place = in_place or name in ("iadd", "isub", "imul", "itruediv")
        if node.op == "call_module":
            in_place = bool(getattr(self._root.get_submodule(str(node.target)), "inplace", False))
        if not in_place or not node.args or not isinstance(node.args[0], fx.Node):
            return
        order = {entry: place for place, entry in enumerate(node.graph.nodes)}
        for seen in sorted(self._sharing_memory(node.args[0]), key=lambda entry: order[entry]):
            if any(order[user] > order[node] for user in seen.users if user.op != "output"):
                refuse(
                    f"{name}, which overwrites {seen.name} before it is read again",
                    "use the form that does not work in place.",
                )

    def _sharing_memory(self, node: fx.Node) -> set[fx.Node]:
        """A node and what may be a view of the same tensor."""
        found, ahead = {node}, [node]
        while ahead:
            here = ahead.pop()
            near = [user for user in here.users if self._is_view(user)]
            if self._is_view(here):
                near += [entry for entry in here.args[:1] if isinstance(entry, fx.Node)]
            ahead += [entry for entry in near if entry not in found]
            found.update(near)
        return found

    def _is_view(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(
                self._root.get_submodule(str(node.target)), (nn.Flatten, nn.Unflatten, nn.Identity)
            )
        return getattr(node.target, "__name__", node.target) in VIEW_NAMES

    def _fold(self, node: fx.Node, arguments: Any, options: Any) -> Any:
        """A computation on constants, done here and now."""
        if node.op == "call_method":
            return getattr(arguments[0], str(node.target))(*arguments[1:], **options)
        function: Any = node.target
        return function(*arguments, **options)

    def _view(self, node: fx.Node, arguments: Any, options: Any) -> Any:
        """A view of a parameter. Anything else done to one could not be written back."""
        name = getattr(node.target, "__name__", str(node.target))
        reference = arguments[0]
        if isinstance(reference, Reference):
            if name == "getattr" and arguments[1] in ("shape", "dtype", "device", "ndim"):
                return getattr(reference.tensor, arguments[1])
            if name in ("size", "dim"):
                return getattr(reference.tensor, name)(*arguments[1:])
            if name == "getattr" and arguments[1] in ("T", "mT"):
                return reference.view("transpose", -1, -2)
            if name in VIEWS and not options:
                return reference.view(name, *arguments[1:])
        if self.functions.get(node.target) is not None and name == "embedding":
            return self.call(node.target, *arguments, **options)
        refuse(f"{name} of a parameter", "use parameters as they are: views of them, added or multiplied.")

    def _message(self, node: fx.Node, error: Unsupported) -> str:
        stack: Any = node.meta.get("nn_module_stack") or {}
        paths = [str(entry[0] if isinstance(entry, tuple) else entry) for entry in stack.values()]
        path = self.path or (paths[-1] if paths and not self._wrapped else "")
        where = f" in {path!r}" if path else f" in {type(self.module).__name__}"
        return f"from_torch cannot translate {error.what}{where}{_line(node)}; {error.advice}"


ADVICE = (
    "write it with supported modules (docs/tutorials/from_torch.md lists them), or build the network by "
    "pctt.graph."
)


def refuse(what: str, advice: str) -> NoReturn:
    raise Unsupported(what, advice)


VIEW_NAMES = (
    *("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "permute", "transpose", "swapaxes"),
    *("chunk", "split", "narrow", "select", "unbind", "getitem", "getattr", "contiguous"),
)


def _leaves(given: Any) -> list[Any]:
    if isinstance(given, (tuple, list)):
        return [leaf for part in given for leaf in _leaves(part)]
    if isinstance(given, dict):
        return [leaf for part in given.values() for leaf in _leaves(part)]
    if isinstance(given, slice):
        return [given.start, given.stop, given.step]
    return [given]


def _described(given: Any) -> str:
    if isinstance(given, Value):
        return "an activity"
    if isinstance(given, Reference):
        return f"the parameter {given.name}"
    if isinstance(given, Tensor):
        return f"a constant tensor {list(given.shape)}"
    return repr(given) if isinstance(given, (BatchSize, int, float, str)) else f"a {type(given).__name__}"


def _line(node: fx.Node) -> str:
    """The line of the user's forward that the node comes from."""
    torch_folder = str(Path(torch.__file__).parent)
    frames = re.findall(r'File "(.*?)", line (\d+), in (.*)\n\s*(.*)', node.stack_trace or "")
    # Before the call of `trace` stand the frames of who called from_torch.
    inside = [
        n for n, (file, _, name, _) in enumerate(frames) if file.startswith(torch_folder) and name == "trace"
    ]
    for file, number, _, code in reversed(frames[inside[-1] if inside else 0 :]):
        if not file.startswith(torch_folder):
            return f" ({file}, line {number}: {code})"
    return ""
