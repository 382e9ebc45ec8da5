"""Models of a pool: intake, stored folders, mixtures resolved to recipes, merged folders."""
