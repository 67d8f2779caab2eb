"""One HTML page about a run, whole in itself: what it read, how it learnt, what happened to it, what it can do."""
