"""Answers taken apart as they come: what is said, what is thought before it, and the tools that are called."""
