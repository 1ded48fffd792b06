"""How long a trial is timed (`step_plan`) and what its step times say (`intervals`)."""
