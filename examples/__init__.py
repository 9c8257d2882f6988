"""One short module for each way to extend the package; a test runs every one."""
