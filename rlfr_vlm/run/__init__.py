"""A run's folder and what watches it: records, monitors, what follows from them, trackers."""
