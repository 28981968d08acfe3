"""The mesh, where parameters live on it, and host batches onto it."""
