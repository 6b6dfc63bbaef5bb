"""Who learns: a fresh model from a spec, or any causal language model from a folder or the hub."""
