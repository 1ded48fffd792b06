"""Which trial next, and when to stop: the search, its console and its commands."""
