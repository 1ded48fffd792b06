"""The replayed objective answers what was recorded, at once."""

from pathlib import Path

from ds_tune.objectives.machine import GIB, Machine
from ds_tune.objectives.objective import Objective
from ds_tune.objectives.recorded.recording import Recording
from ds_tune.objectives.recorded.replay import ReplayObjective
from ds_tune.objectives.trial import Failure, FailureKind, Provenance, TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload

CONFIG = TrialConfig(zero_stage=0, micro_batch_size=8, gradient_accumulation_steps=1)
FAILURE = Failure(kind=FailureKind.OUT_OF_MEMORY, message="it was recorded so", phase="training", wall_seconds=40.0)


def test_a_trial_is_answered_with_what_was_recorded_and_leaves_nothing(tmp_path: Path) -> None:
    surface = Recording(
        machine=Machine(device="cpu", name="CPU", ranks=2, memory_bytes=GIB),
        workload=HuggingFaceWorkload(model="gpt2-nano", seq_len=32, dtype="fp32"),
        versions={},
        outcomes={CONFIG: FAILURE},
    )
    objective: Objective = ReplayObjective(surface)
    objective.prepare()
    phases: list[str] = []
    assert objective.run(CONFIG, tmp_path, phases.append, best_samples_per_second=1e9) == FAILURE
    objective.close()
    assert objective.provenance is Provenance.REPLAYED
    assert list(tmp_path.iterdir()) == []
