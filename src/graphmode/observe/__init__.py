"""Tools that look at the engine from outside."""
