"""Checkpoints from one library's form into another's: Hugging Face, t5x, ours."""

__vikhr_t5__ = True  # tells this package from another installed one that is called `conversion`
