"""Keeping a pool small and its history readable: removal, collection, compaction, log, stats."""
