"""What `compare.py` is made of: the search for a rate, a run in a process of its own, the page of results."""
