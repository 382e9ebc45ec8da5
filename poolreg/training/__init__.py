"""Training models for a pool: recipes, data order, the loop, jobs."""
