"""The kinds of training that can be tuned.

A kind is a module beside this one and a row of `KINDS`. It is a frozen dataclass of plain values with the members of
`WorkloadKind`, which is all that anybody outside `objectives.workload`, and the rank that trains it, may ask of it.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, Self, TypeAlias

from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload


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
        """Tokens of every sample; None where samples differ, or have no tokens."""

    @property
    def weights_are_loaded(self) -> bool:
        """Whether training begins from given weights, so that no shape of the model can change."""

    @property
    def base_ds_config(self) -> Mapping[str, Any]:
        """The user's own DeepSpeed settings; `objectives.ds_config` lays each trial's over them."""

    def model_document(self) -> Mapping[str, Any] | None:
        """Configuration of the model in transformers' JSON form; None where it has none.

        Raises:
            UsageError: it cannot be had here.
        """

    def training_words(self) -> list[str]:
        """Program and arguments that train it under DeepSpeed's launcher, less the DeepSpeed configuration."""

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the tag under `type`."""

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """The reverse; the tag is not in the document."""


KINDS: dict[str, type[HuggingFaceWorkload]] = {kind.kind: kind for kind in (HuggingFaceWorkload,)}

Workload: TypeAlias = HuggingFaceWorkload
"""Union of the kinds."""


def workload_from_json(document: Mapping[str, Any]) -> Workload:
    """Workload of a document, whose tag is under `type`; studies from before there were kinds have none."""
    fields = dict(document)
    return KINDS[fields.pop("type", HuggingFaceWorkload.kind)].from_json(fields)
