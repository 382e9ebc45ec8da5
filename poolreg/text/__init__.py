"""Partitions and evalsets: reading files as documents, fingerprints, base units."""
