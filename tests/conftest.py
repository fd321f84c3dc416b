"""Commands and tasks take settings from VIKHR_T5_* variables, and set them: no test leaves any to the next."""

import os
from collections.abc import Iterator

import pytest
from own_variables import own_variables


@pytest.fixture(autouse=True)
def _variables_are_as_before() -> Iterator[None]:
    before = own_variables()
    yield
    for name in own_variables().keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
