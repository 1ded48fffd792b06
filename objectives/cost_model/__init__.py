"""Predicted bytes and seconds of a `TrialConfig`, before anything is launched: no torch, no GPU.

`model.CostModel` is the whole of it: `architecture` counts parameters, `hardware` knows what GPUs can do, `memory` and
`step_time` add up the terms, `calibration` corrects them by what was measured.
"""
