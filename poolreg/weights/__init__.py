"""Model folders and files: strict reading, identity, exact averaging. Knows no pool."""
