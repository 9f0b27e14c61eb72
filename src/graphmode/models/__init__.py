"""Models straight from Hugging Face transformers, with our attention and experts in place of theirs."""
