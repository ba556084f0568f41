"""What is kept on disk so that a run can go on or be used elsewhere: checkpoints, shards, export,
the run's lock.
"""
