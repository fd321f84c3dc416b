"""Mistral-7B for Russian: vocabulary, continued pre-training, chats; the PyTorch sibling of vikhr_t5."""
