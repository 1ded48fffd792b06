"""What is trained, as plain values that need no torch."""
