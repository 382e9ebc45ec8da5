"""Scoring text, the memo, answers and sweeps."""
