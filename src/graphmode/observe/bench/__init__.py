"""The benchmark: four workloads, measured through ``LLM.generate`` beside eager runs, transformers and the floor."""
