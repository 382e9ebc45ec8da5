"""Is a pool what it was? Levels of verification, and repair of what is not."""
