"""Attention over a paged KV cache, and over segments of packed tokens."""
