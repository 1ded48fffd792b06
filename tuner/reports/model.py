"""How many parameters a model has, in words."""

from ds_tune.objectives.cost_model.architecture import architecture_of
from ds_tune.objectives.errors import UsageError
from ds_tune.objectives.trial import Measurement
from ds_tune.storage.records import StudySummary


def parameters_words(parameters: int, active: int | None = None, *, is_exact: bool = True) -> str:
    """Number of parameters, and of those that a token is multiplied with where there are experts.

    >>> parameters_words(46_702_792_704, 12_879_925_248)
    '46703M parameters, of which a token uses 12880M'
    """
    words = f"{'' if is_exact else 'about '}{_millions(parameters)} parameters"
    return words if active is None else f"{words}, of which a token uses {_millions(active)}"


def _millions(count: int) -> str:
    return f"{count / 1e6:.0f}M" if count >= 1e8 else f"{count / 1e6:.3g}M"


def model_words(summary: StudySummary) -> str | None:
    """The parameters of a study's model; None where nobody knows them."""
    active, is_exact, counted = None, True, None
    try:
        architecture = architecture_of(summary.workload)
        active, is_exact, counted = architecture.active_parameters, architecture.is_exact, architecture.parameters
    except UsageError:
        pass  # what a trial has counted is known all the same
    outcome = summary.best.outcome if summary.best is not None else None
    if isinstance(outcome, Measurement) and not is_exact:
        counted, is_exact = outcome.model_parameters, True
    return None if not counted else parameters_words(counted, active, is_exact=is_exact)
