"""Associative memories: what they recall, against closed forms and against what they were given."""

import pytest
import torch
from torch import Tensor

import pctt
from pctt import HierarchicalMemory, Inference, RecurrentMemory
from pctt.data import load
from pctt.memory import PATTERN, capacity, hopfield, nearest

UPPER = torch.arange(64) < 32


@pytest.fixture(scope="module")
def digits() -> Tensor:
    return load("digits").train.inputs


def correlated(count: int, units: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(units, units, generator=generator, dtype=torch.float64)
    return torch.randn(count, units, generator=generator, dtype=torch.float64) @ mixing / units**0.5 + 1.0


def gaussian_answer(patterns: Tensor, x: Tensor, known: Tensor, ridge: float = 0.0) -> Tensor:
    """The mean of the unknown units given the known ones, under the patterns' mean and covariance."""
    mean = patterns.mean(0)
    covariance = (patterns - mean).T @ (patterns - mean) / len(patterns)
    covariance = covariance + ridge * torch.eye(len(mean), dtype=patterns.dtype)
    across = covariance[~known][:, known] @ torch.linalg.inv(covariance[known][:, known])
    answer = x.clone()
    answer[:, ~known] = mean[~known] + (x[:, known] - mean[known]) @ across.T
    return answer


def test_a_recurrent_memory_recalls_the_conditional_mean():
    """E13: the resting point of the node-local rule, converged to 1e-8."""
    patterns, known = correlated(200, 6), torch.tensor([1, 0, 1, 1, 0, 0]).bool()
    memory = RecurrentMemory(6, dtype=torch.float64)
    memory.learn(patterns, ridge=1e-9)
    x = correlated(5, 6) + 0.3
    answer = memory.recall(x, known, Inference(6000, 0.3, dynamics="momentum", momentum=0.9))
    torch.testing.assert_close(answer, gaussian_answer(patterns, x, known, 1e-9), rtol=0, atol=1e-8)


def test_learning_tends_to_the_closed_form_and_makes_i_minus_w_sigma_diagonal():
    """E13, by the local rule with all units clamped; 1500 epochs of full batches."""
    generator = torch.Generator().manual_seed(0)
    own, common = (torch.randn(50, units, generator=generator, dtype=torch.float64) for units in (5, 1))
    patterns = own + 0.7 * common + 0.5
    memory = RecurrentMemory(5, batch_size=50, dtype=torch.float64)
    assert memory.fit(patterns, 1500, pctt.SGD(0.1)).status.ok
    learned = memory.weights[PATTERN]["weight"]
    assert float(learned.diagonal().abs().max()) == 0.0
    exact = RecurrentMemory(5, dtype=torch.float64)
    exact.learn(patterns, ridge=1e-12)
    torch.testing.assert_close(learned, exact.weights[PATTERN]["weight"], rtol=0, atol=1e-3)
    centred = patterns - patterns.mean(0)
    product = (torch.eye(5, dtype=torch.float64) - exact.weights[PATTERN]["weight"].T) @ (centred.T @ centred)
    off = product - torch.diag(product.diagonal())
    assert float(off.abs().max()) < 1e-6 * float(product.diagonal().abs().max())


def test_a_recurrent_memory_of_digits_completes_and_cleans(digits):
    stored = digits[:20]
    memory = RecurrentMemory(64)
    memory.learn(stored, ridge=1e-4)
    half = memory.recall(stored * UPPER, UPPER)
    assert torch.equal(half[:, UPPER], stored[:, UPPER])
    assert float((half - stored).square().mean()) < 0.05 * float((stored * UPPER - stored).square().mean())
    noise = 0.2 * torch.randn(stored.shape, generator=torch.Generator().manual_seed(0))
    clean = memory.recall(stored + noise, asking=Inference(200, 0.2, dynamics="momentum", momentum=0.9))
    assert float((clean - stored).square().mean()) < 0.6 * float(noise.square().mean())


def test_a_hierarchical_memory_completes_what_it_has_learned(digits):
    """Better than the mean pattern, which is what an untrained memory could know at best."""
    stored = digits[:10]
    memory = HierarchicalMemory(64, (16, 64), batch_size=10)
    assert memory.fit(stored, 150, pctt.Adam(3e-3)).status.ok
    answer = memory.recall(stored * UPPER, UPPER)
    mean = torch.where(UPPER, stored, stored.mean(0))
    assert float((answer - stored).square().mean()) < 0.25 * float((mean - stored).square().mean())
    assert torch.equal(answer[:, UPPER], stored[:, UPPER])


def test_each_pattern_may_have_its_own_mask(digits):
    stored = digits[:6]
    memory = RecurrentMemory(64)
    memory.learn(stored, 1e-4)
    known = torch.rand(stored.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    answer = memory.recall(stored * known, known)
    assert torch.equal(answer[known], stored[known])
    one = memory.recall(stored[:1] * known[:1], known[0])
    torch.testing.assert_close(answer[:1], one, rtol=0, atol=1e-4)  # fp32, 1000 steps in batches of 6 and 1


def test_more_patterns_are_recalled_worse(digits):
    def make(patterns: Tensor) -> RecurrentMemory:
        memory = RecurrentMemory(64)
        memory.learn(patterns, 1e-4)
        return memory

    few, many = capacity(make, digits, (5, 60), UPPER)
    assert (few.count, many.count) == (5, 60)
    assert few.error < many.error and few.recalled > many.recalled and few.error < few.given


def test_a_memory_is_a_network_that_a_checkpoint_keeps(tmp_path, digits):
    memory = RecurrentMemory(64)
    trainer = pctt.Trainer(memory.net, memory.training, weights=memory.weights, clamped=(PATTERN,))
    trainer.fit({PATTERN: digits[:20]}, 1)
    trainer.save(tmp_path)
    assert pctt.load(tmp_path).net == memory.net


def test_what_nearest_and_hopfield_recall(digits):
    stored = digits[:30]
    assert torch.equal(nearest(stored, stored * UPPER, UPPER), stored)
    sharp = hopfield(stored, stored * UPPER, UPPER, sharpness=100.0)
    assert float((sharp - stored).square().mean()) < 1e-3


@pytest.mark.parametrize(
    "memory", [HierarchicalMemory(4, (2,)), RecurrentMemory(4)], ids=["hierarchical", "recurrent"]
)
def test_patterns_of_another_size_are_refused(memory):
    with pytest.raises(ValueError, match=r"patterns must be \[N, 4\]"):
        memory.recall(torch.zeros(2, 5))


def test_the_knobs_are_checked():
    with pytest.raises(ValueError, match="prior"):
        HierarchicalMemory(4, prior=0.0)
    with pytest.raises(ValueError, match="units"):
        RecurrentMemory(1)
