"""Keeping a pool whole and small: verify and repair, garbage collection, compaction, reports."""
