"""`quick_jit`: jax.jit that compiles in half the time and runs slower. Compiling is most of a small test's time."""

from functools import partial

import jax

quick_jit = partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)
