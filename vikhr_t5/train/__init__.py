"""The trainer: losses, optimizers, state, step, loop, checkpoints, metrics."""
