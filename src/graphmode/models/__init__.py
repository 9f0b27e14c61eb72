"""Models straight from Hugging Face transformers, with our attention in place of theirs."""
