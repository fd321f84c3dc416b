"""vikhr-t5: train T5 models in JAX for Russian, or any language that English-first models tokenize badly."""

__version__ = "0.1.0"
