"""Where a pool's facts are kept: objects, journal and catalog, changed together."""
