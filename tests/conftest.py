"""One thread (the machine is shared) and the same random numbers in every test."""

import os

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
torch.set_num_threads(1)
# No deadline: the first call of a torch operator can take a second.
settings.register_profile("emonavi", deadline=None, max_examples=60, derandomize=True)
settings.register_profile("thorough", deadline=None, max_examples=1000)  # --hypothesis-profile=thorough
settings.load_profile("emonavi")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
