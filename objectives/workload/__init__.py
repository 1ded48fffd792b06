"""The training that is tuned, as plain values that need no torch."""
