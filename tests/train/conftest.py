"""Compiling is most of a small test's time: here it is quick, and remembered, for child processes too."""

import os

import jax
import pytest


@pytest.fixture(scope="package", autouse=True)
def _quick_compilation(tmp_path_factory):
    changed = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("xla")),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    before = {name: jax.config.values[name] for name in changed}
    for name, value in changed.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
        del os.environ[name.upper()]
