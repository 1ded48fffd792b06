"""A rank that runs a person's own training script: what it is told, what it does, and how it ends."""
