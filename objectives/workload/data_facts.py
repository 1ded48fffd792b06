"""What a look at a dataset showed, as plain values."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DataFacts:
    """How samples are made of a dataset."""

    words: str
    """Columns, template and tokenizer that are used, in words without a full stop."""
    mean_tokens: float | None = None
    """Tokens of a sample in the mean, beyond `seq_len` cut off, likewise below; None where samples are packed."""
    shortest_sample: int | None = None
    longest_sample: int | None = None

    @property
    def lengths_differ(self) -> bool:
        """Whether samples differ in length, so that tokens are the measure."""
        return self.shortest_sample != self.longest_sample

    @property
    def counting(self) -> str:
        """What is counted in place of samples, in words; empty where it is samples."""
        if not self.lengths_differ:
            return ""
        span = f"{self.shortest_sample}–{self.longest_sample}"
        return f"{self.mean_tokens:.0f} tokens a sample ({span}); tokens, padding apart, are what is counted"
