"""The paged KV cache: what layers keep, its memory and its blocks."""
