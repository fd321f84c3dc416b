"""Mistral-7B for Russian: vocabulary, continued pre-training, instructions. Arrives in a later version."""
