"""Everything that touches the insides of transformers."""
