"""The engine: scheduler, paged KV cache bookkeeping, batches, streams."""
