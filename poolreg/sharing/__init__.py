"""Pools that travel: pushed to and pulled from the Hub, other storage, and single files."""
