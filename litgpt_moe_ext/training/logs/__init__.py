"""The logs of a run: two tables of metrics, and the terminal's lines."""

METRICS_FILE, WIDE_FILE, TRANSCRIPT_FILE = "metrics.csv", "metrics-wide.csv", "train.log"
"""Names of the files in a run's directory."""
ANOMALIES_FOLDER, EXPORTS_FOLDER = "anomalies", "exported"
"""Names of its folders that are not LitGPT checkpoints."""
