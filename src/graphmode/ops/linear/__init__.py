"""Linear layers, by how many rows they take."""
