"""Everything that touches the insides of transformers; ``patches.py`` lists what is changed or read there, and why."""
