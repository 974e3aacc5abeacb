"""Makes the scripts importable and the tests repeatable."""
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="the kills and the fuzzing in their long form, minutes each")


@pytest.fixture
def long(request):
    return request.config.getoption("--long")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
