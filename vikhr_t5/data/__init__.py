"""The data road: vocabulary, sources, cache, token store, denoisers, packing, batches. No JAX here."""
