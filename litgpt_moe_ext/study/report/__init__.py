"""The results of a study as statistics, pictures and a page."""
