"""Plants known faults, one at a time, in a copy of the tree, and sees whether the tests notice.

Each fault is one piece of text replaced by another: a sign, a transpose, a factor, a neighbour, a check left
out. The tests of its family are run on the copy and must fail. First the same tests are run on an unmodified
copy and must pass. The working tree is never touched.

    python tools/plant_faults.py                      all of them, two at a time: a few minutes
    python tools/plant_faults.py --only adam-betas    those whose name contains this
    python tools/plant_faults.py --list               what there is

Exit code: 0 all faults were noticed, 1 one survived, 2 the tool cannot tell (text not found exactly once, the
unmodified copy fails, or the planted copy does not even import).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("pctt", "kernels", "tests", "tools", "pyproject.toml", "README.md")
TIMEOUT_S = 300

EQUALITIES = "tests/unit/test_equalities.py"
SETTINGS = "tests/unit/test_inference_settings.py"
RULES = "tests/property/test_local_rules.py"
PROGRAM = "tests/unit/test_program.py"
LEARNING = "tests/unit/test_learning.py"
VARIANTS = "tests/unit/test_variants.py"

FAMILIES: dict[str, tuple[str, ...]] = {
    "sign": (EQUALITIES,),
    "transpose": (EQUALITIES,),
    "factor": (SETTINGS,),
    "shift": (PROGRAM,),
    "stale": (EQUALITIES,),
    "derivative": (RULES,),
    "clamp": (RULES,),
    "grouping": (PROGRAM,),
    "learning": (LEARNING,),
    "variants": (VARIANTS,),
    "bidirectional": ("tests/unit/test_bidirectional.py",),
    "energies": ("tests/unit/test_energies.py",),
    "scaling": ("tests/unit/test_scaling.py",),
    "theory": ("tests/unit/test_theory.py",),
    "stopping": (SETTINGS,),
    "twin": ("tests/unit/test_backprop.py",),
    "network": ("tests/unit/test_network.py",),
    "card": ("tests/unit/test_emulated.py", "tests/unit/test_lowering.py"),
    "card graphs": ("tests/unit/test_graph_lowering.py",),
    "mesh": ("tests/unit/test_mesh.py",),
    "placement": ("tests/unit/test_budget.py", "tests/unit/test_cost.py", "tests/unit/test_plan.py"),
    "boxes": ("tests/unit/test_boxes.py",),
    "config": ("tests/unit/test_config.py",),
    "resume": ("tests/unit/test_run.py",),
    "checkpoint": ("tests/unit/test_checkpoint.py",),
    "record": ("tests/unit/test_record.py",),
    "data": ("tests/unit/test_idx.py", "tests/unit/test_data.py"),
    "maps": ("tests/unit/test_maps.py",),
    "graphs": ("tests/unit/test_graph.py",),
    "any graph": ("tests/property/test_graphs.py",),
    "fused": ("tests/unit/test_fused.py",),
    "waits": ("tests/unit/test_fused_schedule.py",),
    "feed": ("tests/unit/test_feed.py",),
    "shown": ("tests/unit/test_describe.py",),
    "bench": ("tests/unit/test_bench.py",),
}
"""Family: the test files that must notice its faults."""


@dataclass(frozen=True)
class Fault:
    """`old`, found exactly once in `file`, becomes `new`."""

    name: str
    family: str
    file: str
    old: str
    new: str


DENSE = "pctt/layers/dense.py"
DYNAMICS = "pctt/inference/dynamics.py"
STATE = "pctt/state.py"
STEPS = "pctt/inference/steps.py"
ENGINE = "pctt/engine.py"
ENERGIES = "pctt/energies.py"
REFERENCE = "pctt/backends/reference.py"
LOWERING = "pctt/backends/lowering.py"
GRAPH_LOWERING = "pctt/backends/graph_lowering.py"
MESH = "pctt/backends/mesh.py"
BLOCK = "pctt/layers/block.py"
REFERENCE_MAPS = "pctt/backends/reference_maps.py"
FUSED_TASKS = "pctt/backends/fused_tasks.py"
FUSED_CHAIN = "pctt/backends/fused_chain.py"
FUSED_SCHEDULE = "pctt/backends/fused_schedule.py"
BOXES = "pctt/placement/boxes.py"
SCALING = "pctt/placement/scaling.py"
DESCRIBE = "pctt/describe.py"
SAMENESS = "pctt/bench/sameness.py"
MEASURING = "pctt/bench/measuring.py"

FAULTS = (
    Fault(
        "error-sign",
        "sign",
        DENSE,
        "at.product(out, change, weight, base, sign * self.scale)",
        "at.product(out, change, weight, base, -sign * self.scale)",
    ),
    Fault(
        "feedback-sign",
        "sign",
        DYNAMICS,
        "pull(variable, variable, boost, INFERENCE_RATE)",
        "pull(variable, variable, -boost, INFERENCE_RATE)",
    ),
    Fault(
        "own-error-sign",
        "sign",
        DYNAMICS,
        "not pulls_first:\n        at.add(variable, variable, own, -boost",
        "not pulls_first:\n        at.add(variable, variable, own, boost",
    ),
    Fault(
        "weight-gradient-sign",
        "sign",
        DENSE,
        "source, gated, scale=-self.scale",
        "source, gated, scale=self.scale",
    ),
    Fault(
        "bias-gradient-sign",
        "sign",
        DENSE,
        'at.layer("bias_gradient", index), gated, scale=-1.0',
        'at.layer("bias_gradient", index), gated, scale=1.0',
    ),
    Fault(
        "inference-momentum-sign",
        "sign",
        DYNAMICS,
        "velocity, at.inference.momentum)",
        "velocity, -at.inference.momentum)",
    ),
    Fault(
        "feedback-not-transposed",
        "transpose",
        REFERENCE,
        "_positions(instruction, a), weight.mT, addend, scalars)",
        "_positions(instruction, a), weight, addend, scalars)",
    ),
    Fault(
        "outer-product-swapped",
        "transpose",
        REFERENCE,
        "_matmul(instruction, outs[0], a.mT, b, addend, scalars)",
        "_matmul(instruction, outs[0], b.mT, a, addend, scalars)",
    ),
    Fault("energy-without-half", "factor", ENERGIES, "return 0.5 * (square", "return 1.0 * (square"),
    Fault("log-precision-sign", "factor", ENERGIES, "-0.5 * energy.log", "+0.5 * energy.log"),
    Fault("gradient-not-per-sample", "factor", ENGINE, ", 1.0 / batch_size", ", 1.0"),
    Fault(
        "rate-twice",
        "factor",
        ENGINE,
        "INFERENCE_RATE: inference.rate,",
        "INFERENCE_RATE: inference.rate**2,",
    ),
    Fault(
        "precision-forgotten",
        "derivative",
        DENSE,
        "signal = at.weighted_error(index) if",
        'signal = at.node("error", index) if',
    ),
    Fault(
        "prediction-from-the-wrong-neighbour",
        "shift",
        DENSE,
        "change = at.change(index - 1)",
        "change = at.change(max(0, index - 2))",
    ),
    Fault(
        "feedback-from-two-layers-up",
        "shift",
        STEPS,
        "for child in at.net.children(index):\n        if child in charged",
        "for child in (min(index + 2, at.last),):\n        if child in charged",
    ),
    Fault("own-error-not-recomputed", "stale", STEPS, "elif index in at.reach.moved:", "elif False:"),
    Fault(
        "slope-at-the-anchor",
        "stale",
        STATE,
        "return drive, self.prediction(index)",
        'return self.node("anchor_drive", index), self.anchor(index)',
    ),
    Fault(
        "gradient-of-the-initial-activity",
        "stale",
        STATE,
        'if index in self.clamped or self.inference.prediction == "fixed" or self.at_anchor:',
        "if True:",
    ),
    Fault(
        "gate-without-derivative",
        "derivative",
        DENSE,
        'return at.derivative(at.node("gated", index), signal, drive, prediction, self.output_function)',
        "return signal",
    ),
    Fault(
        "feedback-without-derivative",
        "derivative",
        DENSE,
        "at.derivative(feedback, feedback, drive, value, self.input_function)",
        "del drive, value",
    ),
    Fault(
        "gelu-slope-at-its-value",
        "derivative",
        REFERENCE,
        "gelu_backward.grad_input, v, z",
        "gelu_backward.grad_input, v, y",
    ),
    Fault(
        "clamped-node-moves",
        "clamp",
        STATE,
        "frozenset(range(len(self.net.nodes))) - self.clamped",
        "frozenset(range(len(self.net.nodes)))",
    ),
    Fault(
        "start-taken-for-the-prediction",
        "clamp",
        STATE,
        "if index not in self.given or index not in self.indices:",
        "if True:",
    ),
    Fault(
        "write-after-read-overlooked",
        "grouping",
        "pctt/program.py",
        "before += [reader for slot in instruction.out for reader in readers.pop(slot, ())]",
        "",
    ),
    Fault(
        "unequal-layers-grouped",
        "network",
        "pctt/groups.py",
        "(layer.bias, widths[i]) if joins",
        "(widths[i],) if joins",
    ),
    Fault(
        "nudge-pulls-from-a-moved-activity",
        "variants",
        DYNAMICS,
        "pulls_first = own != variable and (at.incremental or index == at.last)",
        "pulls_first = own != variable and at.incremental",
    ),
    Fault(
        "heun-of-first-order",
        "variants",
        DYNAMICS,
        "at.add(variable, start, slope, -0.5, INFERENCE_RATE)",
        "at.add(variable, start, slope, -0.55, INFERENCE_RATE)",
    ),
    Fault(
        "noise-without-its-two",
        "variants",
        "pctt/inference/settings.py",
        "math.sqrt(2.0 * knobs.rate",
        "math.sqrt(1.0 * knobs.rate",
    ),
    Fault(
        "nudge-not-divided-out",
        "variants",
        STATE,
        "return PER_SAMPLE if self.nudge is None else PER_NUDGE",
        "return PER_SAMPLE",
    ),
    Fault("skip-without-feedback", "variants", DENSE, "at.add(into, into, signal, scale, scalar)", "pass"),
    Fault(
        "boost-after-the-arrival",
        "variants",
        STATE,
        "self.inference.wave_boost if index not in self.visited",
        "self.inference.wave_boost if index in self.visited",
    ),
    Fault(
        "centred-pair-of-one-side",
        "variants",
        ENGINE,
        "self._set_nudge(-self._nudge, 2.0)",
        "self._set_nudge(self._nudge, 2.0)",
    ),
    Fault(
        "incremental-adam-starts-again",
        "variants",
        ENGINE,
        "(step - 1) * self.program.num_steps",
        "0",
    ),
    Fault(
        "chain-down-pushes",
        "bidirectional",
        "pctt/bidirectional.py",
        "self.up.add_scaled(error, into, addend, -scale, scalar)",
        "self.up.add_scaled(error, into, addend, scale, scalar)",
    ),
    Fault(
        "amortiser-learns-the-start",
        "bidirectional",
        "pctt/bidirectional.py",
        "self._show_down(initial=False)",
        "self._show_down(initial=True)",
    ),
    Fault(
        "variance-of-the-root",
        "energies",
        REFERENCE,
        "variance.add_(aim - variance,",
        "variance.add_(aim.sqrt() - variance,",
    ),
    Fault(
        "log-determinant-halved",
        "energies",
        ENERGIES,
        "return float(torch.linalg.slogdet(self.matrix(units)).logabsdet)",
        "return 0.5 * float(torch.linalg.slogdet(self.matrix(units)).logabsdet)",
    ),
    Fault(
        "scale-forgets-depth",
        "scaling",
        "pctt/scaling.py",
        "(depth if dense[number - 1].skip else 1)",
        "1",
    ),
    Fault(
        "contradictions-unchecked",
        "stopping",
        "pctt/inference/settings.py",
        "if _holds(self, one) and _holds(self, other):",
        "if False:",
    ),
    Fault("spectrum-of-the-first-sample", "theory", "pctt/theory.py", "largest.max()", "largest[0]"),
    Fault("precision-for-variance", "theory", "pctt/theory.py", "1.0 / precision if", "precision if"),
    Fault(
        "card-drift-reaches-padding",
        "card",
        LOWERING,
        'self._binary("multiply", source, self._own(a), self._mask(layer - 1))',
        'self._emit("unary", source, self._own(a))',
    ),
    Fault("adam-betas-swapped", "learning", REFERENCE, 'beta1=options["beta1"]', 'beta1=options["beta2"]'),
    Fault(
        "adam-counts-from-two",
        "learning",
        ENGINE,
        "= rate, float(step)",
        "= rate, float(step + 1)",
    ),
    Fault(
        "weight-decay-sign",
        "learning",
        REFERENCE,
        'alpha=options["weight_decay"]',
        'alpha=-options["weight_decay"]',
    ),
    Fault("sgd-forgets-momentum", "learning", REFERENCE, '.mul_(options["momentum"])', ".mul_(0.0)"),
    Fault("clip-not-applied", "learning", REFERENCE, "stack.mul_(factor)", "stack.mul_(1.0)"),
    Fault("warm-up-starts-at-zero", "learning", "pctt/learning/schedules.py", "(step + 1) /", "step /"),
    Fault("tolerance-not-relative", "stopping", ENGINE, "<= tolerance * abs(before)", "<= tolerance"),
    Fault("divergence-unreported", "stopping", ENGINE, "return Status.DIVERGED", "return status"),
    Fault(
        "twin-loss-without-half",
        "twin",
        "pctt/backprop.py",
        "return 0.5 * ((weighted",
        "return 1.0 * ((weighted",
    ),
    Fault(
        "card-feedback-through-w",
        "card",
        LOWERING,
        'self._received(v), self._turned("transposed", layer)',
        'self._received(v), self._layer("operand", layer)',
    ),
    Fault("card-weights-not-refreshed", "card", LOWERING, "update = (*update, *refresh)", "pass"),
    Fault(
        "card-step-upwards",
        "card",
        LOWERING,
        '"subtract" if other * scale < 0 else "add", step',
        '"add", step',
    ),
    Fault("card-padding-counts", "card", LOWERING, "if self._is_masked(i):", "if False:"),
    Fault(
        "card-rounds-to-zero",
        "card",
        "pctt/backends/emulated.py",
        'out.copy_(values.bfloat16() if form == "bfloat16" else values)',
        'out.copy_(cut(values, 7) if form == "bfloat16" else values)',
    ),
    Fault(
        "mesh-every-chip-for-itself",
        "mesh",
        MESH,
        "gradients=summed(program.gradients)",
        "gradients=program.gradients",
    ),
    Fault(
        "mesh-sum-too-late",
        "mesh",
        MESH,
        "read = [slot for slot in fresh if any(_overlap(slot, other) for other in i.inputs)]",
        "read = [slot for slot in fresh if slot in i.inputs]",
    ),
    Fault(
        "mesh-energies-of-one-chip",
        "mesh",
        "pctt/backends/placed.py",
        "(self.num_chips, -1))[:, :, 0]",
        "(self.num_chips, -1))[:, :1, 0]",
    ),
    Fault(
        "mesh-samples-of-the-first-chip",
        "mesh",
        "pctt/backends/placed.py",
        "self.batch_size - chip * share",
        "self.batch_size",
    ),
    Fault(
        "card-graph-padding-counts",
        "card graphs",
        GRAPH_LOWERING,
        'self._binary("multiply", into, product, self._mask(into))',
        "self._copied(into, product)",
    ),
    Fault(
        "card-graph-sum-too-late",
        "card graphs",
        GRAPH_LOWERING,
        "self._overwrite(out)\n        self.pending[out] = found",
        "self.pending[out] = found",
    ),
    Fault(
        "card-graph-weights-not-refreshed",
        "card graphs",
        GRAPH_LOWERING,
        '(*done["update"], *refresh) if',
        'done["update"] if',
    ),
    Fault(
        "card-graph-shared-gradient",
        "card graphs",
        GRAPH_LOWERING,
        "self._accumulate(out, addend[0], term, i.scale, i.scalar)",
        "self._scaled(out, term, i.scale, i.scalar)",
    ),
    Fault(
        "spread-tensors-cost-nothing",
        "placement",
        LOWERING,
        "-(-self.count * rows * columns // num_cores)",
        "0",
    ),
    Fault(
        "reserve-forgotten",
        "placement",
        "pctt/placement/budget.py",
        "self.tensors + self.reserved + self.circular_buffers",
        "self.tensors + self.circular_buffers",
    ),
    Fault("unknown-key-accepted", "config", "pctt/config.py", "if key not in names:", "if False:"),
    Fault(
        "learning-state-not-restored",
        "resume",
        "pctt/run.py",
        'trainer.engine.load_learning_state(tree.get("learning", {}))',
        "pass",
    ),
    Fault(
        "every-epoch-in-the-same-order",
        "resume",
        "pctt/feed.py",
        "manual_seed(derived_seed(seed, epoch))",
        "manual_seed(derived_seed(seed, 0))",
    ),
    Fault(
        "loader-in-the-same-order-every-epoch",
        "feed",
        "pctt/feed.py",
        "derived_seed(self._seed, number)",
        "derived_seed(self._seed, 0)",
    ),
    Fault(
        "loader-begins-anew-after-a-resume",
        "feed",
        "pctt/feed.py",
        "if count > first:",
        "if count > 0:",
    ),
    Fault(
        "checkpoint-written-in-place",
        "checkpoint",
        "pctt/checkpoint.py",
        'temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")',
        "temporary = path",
    ),
    Fault(
        "checkpoint-order-lost",
        "checkpoint",
        "pctt/checkpoint.py",
        '"names": list(tensors)',
        '"names": sorted(tensors)',
    ),
    Fault(
        "record-cut-one-early", "record", "pctt/record.py", 'record["step"] > step', 'record["step"] >= step'
    ),
    Fault(
        "idx-magic-unchecked",
        "data",
        "pctt/data/idx.py",
        "or magic[0] or magic[1] or",
        "or",
    ),
    Fault("idx-byte-order", "data", "pctt/data/idx.py", '">i4"', '"<i4"'),
    Fault(
        "validation-rows-also-trained-on",
        "data",
        "pctt/data/dataset.py",
        "kept, held_out = order[:-num_held_out]",
        "kept, held_out = order[:]",
    ),
    Fault(
        "add-pulls-without-its-sign",
        "maps",
        "pctt/layers/maps/shaping.py",
        "use.at.add_scaled(v, into, addend, scale * self._sign(number), scalar)",
        "use.at.add_scaled(v, into, addend, scale, scalar)",
    ),
    Fault(
        "gate-multiplied-by-itself",
        "maps",
        "pctt/layers/maps/shaping.py",
        'use.emit("multiply", out, v, use.value(1 - number))',
        'use.emit("multiply", out, v, use.value(number))',
    ),
    Fault(
        "concat-part-from-the-wrong-place",
        "maps",
        "pctt/layers/maps/shaping.py",
        "for shape in use.shapes[:number])",
        "for shape in use.shapes[: max(0, number - 1)])",
    ),
    Fault(
        "softmax-over-all-positions",
        "maps",
        "pctt/layers/maps/shaping.py",
        'return (("last", use.shape[-1]),) if self.name == "softmax" else ()',
        "return ()",
    ),
    Fault(
        "mask-forgotten",
        "maps",
        "pctt/layers/maps/linear.py",
        'use.emit("multiply", out, out, use.weight("mask"))',
        "pass",
    ),
    Fault(
        "change-without-its-base",
        "maps",
        BLOCK,
        'at.add(self._slot(at, index, "change", value), now, self._base(at, index, value), -1.0)',
        'at.copy(self._slot(at, index, "change", value), now)',
    ),
    Fault(
        "branches-overwrite-each-other",
        "maps",
        BLOCK,
        "addend = slot if below in pulled else None",
        "addend = None",
    ),
    Fault(
        "largest-of-the-smallest",
        "maps",
        REFERENCE_MAPS,
        "aten.max_pool2d_with_indices(images, *window)[1]",
        "aten.max_pool2d_with_indices(-images, *window)[1]",
    ),
    Fault(
        "padding-left-out-of-the-mean",
        "maps",
        REFERENCE_MAPS,
        "*window, False, True, None)",
        "*window, False, False, None)",
    ),
    Fault("causal-mask-off-by-one", "maps", REFERENCE_MAPS, ".triu(1)", ".triu(2)"),
    Fault("attention-not-transposed", "maps", REFERENCE_MAPS, "slopes.mT @ queries", "slopes @ queries"),
    Fault(
        "word-counts-once",
        "maps",
        REFERENCE_MAPS,
        "table.index_add_(0, numbers",
        "table.index_copy_(0, numbers",
    ),
    Fault(
        "mean-not-normalised-away",
        "maps",
        REFERENCE_MAPS,
        "inverse * (v - v.mean(axes, keepdim=True) - y",
        "inverse * (v - y",
    ),
    Fault(
        "bias-of-a-convolution-as-it-was",
        "graphs",
        REFERENCE_MAPS,
        "return addend.view(channels, 1), out",
        "return addend.clone().view(channels, 1), out",
    ),
    Fault(
        "pulled-by-one-child-only",
        "any graph",
        STEPS,
        "for child in at.net.children(index):\n        if child in charged",
        "for child in at.net.children(index)[:1]:\n        if child in charged",
    ),
    Fault(
        "second-source-overwrites-the-first",
        "graphs",
        BLOCK,
        "pulled[value], into, addend, scale, scalar)\n                    addend = into",
        "pulled[value], into, addend, scale, scalar)",
    ),
    Fault(
        "shared-gradients-overwrite-each-other",
        "graphs",
        STATE,
        "addend = slot if slot in self.written else None",
        "addend = None",
    ),
    Fault(
        "errors-of-the-sweep-before",
        "graphs",
        STEPS,
        "charged |= _predict_again(at, index, waiting)",
        "pass",
    ),
    Fault(
        "nudge-sees-what-children-have-moved",
        "graphs",
        STEPS,
        "pulls.append(partial(_child_pull,",
        "pulls.insert(0, partial(_child_pull,",
    ),
    Fault(
        "cycle-starts-at-its-prediction",
        "graphs",
        STATE,
        "started = set(self.net.sources_ahead & self.free)",
        "started = set[int]()",
    ),
    Fault(
        "children-not-charged",
        "graphs",
        STATE,
        "for child in self.net.children(index)} if live",
        "for child in self.net.children(index)[:1]} if live",
    ),
    Fault(
        "layers-in-the-order-they-were-given",
        "graphs",
        "pctt/wiring.py",
        "ready = [name for name in left if placed.issuperset(entries[name][1])] or left[:1]",
        "ready = left[:1]",
    ),
    Fault(
        "fused-feedback-of-the-first-core-only",
        "fused",
        FUSED_TASKS,
        "for sender in range(1, self.tensors.num_senders(buffer)):",
        "for sender in range(1, 1):",
    ),
    Fault(
        "fused-feedback-by-the-new-weights",
        "fused",
        FUSED_TASKS,
        'return replace(i, inputs=(a, weights), function="transposed")',
        'return replace(i, inputs=(a, b), function="transposed")',
    ),
    Fault(
        "fused-weights-untransposed",
        "fused",
        FUSED_TASKS,
        "steps = 1 | width << 16 if transposed else width | 1 << 16",
        "steps = width | 1 << 16",
    ),
    Fault(
        "fused-slice-of-the-neighbour",
        "fused",
        FUSED_TASKS,
        "Ref(out.name, part * width * size),",
        "Ref(out.name),",
    ),
    Fault(
        "fused-row-for-rows",
        "fused",
        FUSED_TASKS,
        "if (target.rows == 1) != (joined.target.rows == 1):",
        "if False:",
    ),
    Fault(
        "fused-joined-past-a-read",
        "fused",
        FUSED_TASKS,
        "or joined.read & set(i.out):",
        ":",
    ),
    Fault(
        "fused-value-not-rounded",
        "fused",
        FUSED_CHAIN,
        'if self.values[value].kind != "ROUND":',
        "if False:",
    ),
    Fault(
        "fused-register-reused",
        "fused",
        FUSED_CHAIN,
        "last = {value: len(self.values) for value, _ in self.stores.values()}",
        "last = dict[int, int]()",
    ),
    Fault(
        "shown-defaults-and-nothing-else",
        "shown",
        DESCRIBE,
        "getattr(value, field.name) != default",
        "getattr(value, field.name) == default",
    ),
    Fault(
        "shown-rows-in-the-middle-left-in",
        "shown",
        DESCRIBE,
        "*range(count - last, count)]",
        "*range(most - last, count)]",
    ),
    Fault(
        "shown-shared-weights-counted-again",
        "shown",
        DESCRIBE,
        "own = net.owner(index) == index",
        "own = True",
    ),
    Fault(
        "shown-part-agreed-upon",
        "shown",
        "pctt/parallel/group.py",
        "json.dumps(to_dict(value))",
        "str(value)",
    ),
    Fault(
        "fused-message-not-awaited",
        "waits",
        FUSED_SCHEDULE,
        "entry.waits.append(message)",
        "pass",
    ),
    Fault(
        "fused-credit-not-asked",
        "waits",
        FUSED_SCHEDULE,
        "if needed > 0 or place not in self.settled:",
        "if needed > 0:",
    ),
    Fault("ring-of-one-round-more", "boxes", BOXES, "2 * (num_members - 1)", "2 * num_members"),
    Fault(
        "feedback-over-a-boundary-forgotten",
        "boxes",
        SCALING,
        "return 2 * self.num_steps + 2",
        "return self.num_steps + 2",
    ),
    Fault(
        "fused-own-result-not-awaited",
        "waits",
        FUSED_SCHEDULE,
        "entry.done = max(entry.done, writer)",
        "pass",
    ),
    Fault("bench-anything-is-the-same", "bench", SAMENESS, "FACTOR = 8.0", "FACTOR = 8e4"),
    Fault(
        "bench-floor",
        "bench",
        MEASURING,
        "rate = 2 * work.gemm_size(device) ** 3",
        "rate = work.gemm_size(device) ** 3",
    ),
    Fault(
        "bench-ratio-of-medians",
        "bench",
        MEASURING,
        "return median(a / b for a, b in zip(times, others, strict=True))",
        "return median(times) / median(others)",
    ),
    Fault("bench-same-order", "bench", MEASURING, "entrants[turn:] + entrants[:turn]", "list(entrants)"),
    Fault(
        "bench-not-awaited",
        "bench",
        "pctt/bench/workers/with_torch.py",
        "        torch.cuda.synchronize(device)\n",
        "",
    ),
)


def planted(fault: Fault, root: Path) -> str:
    """The text of the fault's file under `root`, with the fault in it.

    Raises ValueError unless `old` is there exactly once.
    """
    text = (root / fault.file).read_text(encoding="utf-8")
    if text.count(fault.old) != 1:
        raise ValueError(
            f"{fault.name}: the text to replace is in {fault.file} {text.count(fault.old)} times, not once; "
            f"bring tools/plant_faults.py up to date: {fault.old!r}"
        )
    return text.replace(fault.old, fault.new)


def copy_tree(target: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__", ".hypothesis")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=ignore)
        elif source.exists():
            shutil.copy(source, target / name)


def run_tests(folder: Path, files: Iterable[str]) -> tuple[int, str]:
    """(pytest's exit code, its output) for test files of the copy in `folder`, which imports its own pctt."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "--hypothesis-profile=unshrunk",
        *files,
    ]
    # Started inside the copy: "python -m" puts the current folder first, before any installed pctt.
    try:
        result = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return -1, f"no end after {TIMEOUT_S} s"
    return result.returncode, result.stdout + result.stderr


def imported_from(folder: Path) -> Path:
    """The folder of the pctt that a test in `folder` would import."""
    code = "import pctt; print(pctt.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return Path(result.stdout.strip()).resolve().parents[1]


def plant(fault: Fault) -> tuple[str, float, str]:
    """("caught", "SURVIVED" or "BROKEN", seconds, output of pytest) of one fault in a copy of its own."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="pctt_fault_") as name:
        folder = Path(name).resolve()
        copy_tree(folder)
        (folder / fault.file).write_text(planted(fault, folder), encoding="utf-8")
        code, output = run_tests(folder, FAMILIES[fault.family])
    # 1 is "tests failed"; a copy that cannot be imported or never ends says nothing about the tests.
    verdict = {0: "SURVIVED", 1: "caught"}.get(code, "BROKEN")
    return verdict, time.perf_counter() - started, output


def check_unmodified(files: Sequence[str], jobs: int) -> str | None:
    """What is wrong with the tree as it is, or None where all `files` pass on a copy."""
    with tempfile.TemporaryDirectory(prefix="pctt_unmodified_") as name:
        folder = Path(name).resolve()
        copy_tree(folder)
        if imported_from(folder) != folder:
            return f"the copy in {folder} imports pctt from {imported_from(folder)}"
        with ThreadPoolExecutor(jobs) as pool:
            for file, (code, output) in zip(
                files, pool.map(lambda f: run_tests(folder, [f]), files), strict=True
            ):
                if code:
                    return f"{file} fails without any fault:\n{output}"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="NAME", help="faults whose name contains NAME")
    parser.add_argument("--list", action="store_true", help="list the faults and end")
    parser.add_argument("--jobs", type=int, default=2, help="tests run at a time (default 2)")
    options = parser.parse_args(argv)
    chosen = [fault for fault in FAULTS if options.only is None or options.only in fault.name]
    if not chosen:
        print(f"no fault is called like {options.only!r}; see --list", file=sys.stderr)
        return 2
    if options.list:
        for fault in chosen:
            print(f"{fault.name:38}{fault.family:12}{fault.file}")
        return 0
    try:
        for fault in chosen:
            planted(fault, ROOT)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2

    started = time.perf_counter()
    files = list(dict.fromkeys(file for fault in chosen for file in FAMILIES[fault.family]))
    problem = check_unmodified(files, options.jobs)
    if problem:
        print(problem, file=sys.stderr)
        return 2
    print(f"{len(files)} test files pass without a fault ({time.perf_counter() - started:.0f} s)\n")

    print(f"{'fault':38}{'family':12}{'verdict':10}seconds")
    verdicts: list[str] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for fault, (verdict, seconds, output) in zip(chosen, pool.map(plant, chosen), strict=True):
            print(f"{fault.name:38}{fault.family:12}{verdict:10}{seconds:5.1f}", flush=True)
            verdicts.append(verdict)
            if verdict == "BROKEN":
                print(output, file=sys.stderr)
    caught = verdicts.count("caught")
    print(f"\n{caught} of {len(chosen)} faults caught in {time.perf_counter() - started:.0f} s")
    if "BROKEN" in verdicts:
        return 2
    return 0 if caught == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
