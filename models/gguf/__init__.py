"""GGUF files: the header, the config and the vocabulary in it."""
