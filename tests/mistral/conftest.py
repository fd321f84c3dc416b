"""What tests of training share."""

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def environment() -> Iterator[None]:
    """transformers and accelerate write environment variables; one thread is quicker for so small a model."""
    before, threads = dict(os.environ), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)
