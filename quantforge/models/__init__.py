"""The only part that knows architectures: where the layers are, how to load a model and walk through it."""
