"""Commands and tasks take settings from VIKHR_T5_* variables, and set them: no test leaves any to the next."""

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _variables_are_as_before() -> Iterator[None]:
    def ours() -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name.startswith("VIKHR_T5_")}

    before = ours()
    yield
    for name in ours().keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
