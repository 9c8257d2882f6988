"""The callbacks of a training run, one class for each job."""
