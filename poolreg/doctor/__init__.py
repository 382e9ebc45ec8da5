"""Is the machine what a pool needs? Versions, disk, file system, locks, clock."""
