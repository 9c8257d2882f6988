"""Documents out of files: plain text, JSON (lines or a list), CSV, parquet, compressed or inside a tar archive.

`documents.documents` is the only way in. It reads as a stream, so a file may be larger than memory (a JSON list has to
be held whole) and may as well lie behind a URL. What is wrong with a file is a `SettingsError` that names the file and
the place.
"""
