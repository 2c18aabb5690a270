"""What every test shares: one thread each, fixed seeds, and examples that are the same on every run."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import Phase, settings
from runs import TINY

# Two pytest workers on two cores; and with one thread a sum is always taken in the same order.
torch.set_num_threads(1)

# No deadline: a busy machine is no defect. No database: the next run must not depend on this one.
settings.register_profile("pctt", derandomize=True, deadline=None, database=None)
# For tools/plant_faults.py, which asks whether a test fails and not for the smallest example.
settings.register_profile("unshrunk", settings.get_profile("pctt"), phases=(Phase.explicit, Phase.generate))
settings.load_profile("pctt")


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    """A test that draws from a global generator would otherwise depend on the tests that ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The configuration of a run that takes a moment."""
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path
