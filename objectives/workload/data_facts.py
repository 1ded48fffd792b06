"""What a look at a dataset showed, as plain values."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DataFacts:
    """How samples are made of a dataset."""

    words: str
    """Columns, template and tokenizer that are used, in words without a full stop."""
