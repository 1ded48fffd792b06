"""The kinds of training that can be tuned.

A kind is a module beside this one and a row of `KINDS`. It is a frozen dataclass of plain values with the members of
`WorkloadKind`, which is all that anybody outside `objectives.workload`, and the rank that trains it, may ask of it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, TypeAlias

from ds_tune.objectives.knobs import Scalar
from ds_tune.objectives.trial import TrialConfig
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload
from ds_tune.objectives.workload.model_facts import ModelFacts
from ds_tune.objectives.workload.parameter_counts import ParameterCounts
from ds_tune.objectives.workload.script import ScriptWorkload


class WorkloadKind(Protocol):
    """Contract of a kind."""

    kind: ClassVar[str]
    """Its tag in JSON."""

    @property
    def title(self) -> str:
        """Short name of what is trained, for headings."""

    @property
    def description(self) -> str:
        """One line that says what is trained."""

    @property
    def dtype(self) -> str:
        """Precision: `fp16`, `bf16` or `fp32`."""

    @property
    def tokens_per_sample(self) -> int | None:
        """Tokens that are computed for every sample, or the longest; None where that is not known, or it has none."""

    @property
    def counted_tokens_per_sample(self) -> float | None:
        """Mean tokens of a sample, padding apart; None where samples have none, or their padding cannot be told."""

    @property
    def counting(self) -> str:
        """What is counted where samples differ in length, in words without a full stop; empty where they do not."""

    @property
    def data_words(self) -> str:
        """What of the data is trained on, in words without a full stop; empty where it is not ds-tune that reads it."""

    @property
    def weights_are_loaded(self) -> bool:
        """Whether training begins from given weights, so that no shape of the model can change."""

    @property
    def base_ds_config(self) -> Mapping[str, Any]:
        """The user's own DeepSpeed settings; `objectives.ds_config` lays each trial's over them."""

    @property
    def ds_config_is_whole(self) -> bool:
        """Whether these settings are all that it trains with, so that `objectives.ds_config` adds no defaults."""

    @property
    def fills_in_batch_sizes(self) -> bool:
        """Whether the training itself puts batch sizes in the place of `"auto"`."""

    @property
    def own_knobs(self) -> Mapping[str, Scalar]:
        """Knobs that are on in it as the person has it."""

    @property
    def out_of_reach(self) -> frozenset[str]:
        """Knobs that it cannot be given."""

    @property
    def launch_folder(self) -> str | None:
        """Folder that its launch line is for; None for any."""

    def launch_line(self, launcher: Sequence[str], ranks: int, ds_config: Path, config: TrialConfig) -> list[str]:
        """The argv that trains with a configuration.

        Args:
            launcher: DeepSpeed's launcher with the options for this machine's ranks.
            ranks: how many these are.
            ds_config: file with what of the configuration DeepSpeed's own says.
        """

    def extra_files(self, config: TrialConfig) -> dict[str, str]:
        """Texts of files that the launch line reads beside DeepSpeed's configuration, by their names in its folder."""

    def by_hand(self, config: TrialConfig) -> list[str]:
        """Sentences on what of a configuration the launch line cannot say, and has to be written into the code."""

    def in_code(self, config: TrialConfig) -> list[str]:
        """Sentences on how to have in the training's own code what the launch line says of a configuration."""

    @property
    def parameter_counts(self) -> ParameterCounts | None:
        """Parameters as the live model has them; None where only its configuration says how many there are."""

    def model_document(self) -> Mapping[str, Any] | None:
        """Configuration of the model in transformers' JSON form; None where it has none.

        Raises:
            UsageError: it cannot be had here.
        """

    def model_facts(self) -> ModelFacts | None:
        """What its model is like as transformers builds it; None where only its configuration tells.

        Raises:
            UsageError: its configuration cannot be had here, or it is of no model that is trained.
        """

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the tag under `type`."""

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """The reverse; the tag is not in the document."""


Workload: TypeAlias = HuggingFaceWorkload | ScriptWorkload
"""Union of the kinds."""

KINDS: dict[str, type[Workload]] = {kind.kind: kind for kind in (HuggingFaceWorkload, ScriptWorkload)}


def workload_from_json(document: Mapping[str, Any]) -> Workload:
    """Workload of a document, whose tag is under `type`; studies from before there were kinds have none."""
    fields = dict(document)
    return KINDS[fields.pop("type", HuggingFaceWorkload.kind)].from_json(fields)
