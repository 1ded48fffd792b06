"""The tuner's side of real runs: start ranks, tell them what to run, watch them, end them."""
