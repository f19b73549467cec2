"""Exit codes of `train.py` and `compare.py`."""

FAILED = 1  # an error that nobody expected, with its traceback
USAGE = 2  # a bad flag, or a missing device or file: nothing was started
DIVERGED = 3  # the run diverged; its last checkpoint is from before
HOST_LOST = 4  # another host of the run is gone
BAD_DATA = 5  # more unreadable images than --max_unreadable_images
NOT_SAVED = 6  # a file could not be written or read, such as a checkpoint
PREEMPTED = 75  # stopped by a signal and saved: the same command resumes the run
