"""The worker: one model, one KV cache, one step at a time."""
