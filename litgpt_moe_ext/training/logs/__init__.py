"""What a run leaves behind to read: two tables of numbers, and the lines that the terminal showed."""

METRICS_FILE, WIDE_FILE, TRANSCRIPT_FILE = "metrics.csv", "metrics-wide.csv", "train.log"
"""Names of the files in a run's directory."""
ANOMALIES_FOLDER, EXPORTS_FOLDER = "anomalies", "exported"
"""Names of its folders that hold no checkpoints of LitGPT's."""
