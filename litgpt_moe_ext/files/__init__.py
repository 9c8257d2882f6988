"""Safe files: durable writes, one process at a time, and checksums."""
