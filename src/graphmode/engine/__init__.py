"""The engine: continuous batching over a paged KV cache, every step one replay of a graph."""
