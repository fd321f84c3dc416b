"""T5 in JAX: configuration, pure functions, network, decoding."""
