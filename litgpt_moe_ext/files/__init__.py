"""What keeps files right whoever writes them: on the disk for good, by one process at a time, and with checksums."""
