"""Programs that are kept between runs, and the step of a CPU, which cannot be."""

import os
import subprocess
import sys

PROGRAM = """
import jax, jax.numpy as jnp
from vikhr_t5.model import ops
from vikhr_t5.train.compiling import compiled, use_compilation_cache

use_compilation_cache()
x, kernel = jnp.ones((512, 512)), jnp.ones((512, 512))
trained = jax.jit(jax.grad(lambda kernel: ops.dense(x, kernel).sum()))
assert (compiled(trained.lower(kernel))(kernel) == 512).all()
assert compiled(jax.jit(lambda x: 2 * x).lower(x))(x)[0, 0] == 2
"""


def test_a_program_that_cannot_be_kept_is_no_warning(tmp_path):
    settings = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-W", "error::UserWarning", "-c", PROGRAM]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert any(name.startswith("jit__lambda") for name in os.listdir(tmp_path))  # the second
