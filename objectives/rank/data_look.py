"""A process that has a look at a workload's dataset and ends: what of it is trained on, or why nothing can be.

It reads a workload as JSON from its standard input and writes one line of JSON to its standard output:
`{"facts": …}` or `{"refused": …, "usage": …}`. `objectives.running.first_look` starts it. What it reads stays in the
cache of `datasets`, so that ranks need not wait for it.
"""

import dataclasses
import itertools
import json
import os
import sys
from typing import Any

from ds_tune.objectives.errors import DsTuneError, UsageError
from ds_tune.objectives.rank.dataset import LOOKED_AT, open_samples
from ds_tune.objectives.rank.tokens import MOST_SAMPLES, Encoder, sample_ids
from ds_tune.objectives.workload.data_facts import DataFacts
from ds_tune.objectives.workload.huggingface import HuggingFaceWorkload


def look_at(workload: HuggingFaceWorkload) -> DataFacts:
    """
    Raises:
        UsageError: the dataset cannot be read, or its first rows cannot be made tokens.
    """
    assert workload.dataset is not None
    samples = open_samples(workload.dataset, workload.text_column)
    reading = samples.reading
    words = [reading.words]
    encoder = None if reading.is_ids else Encoder(workload)
    if encoder is not None and reading.is_chat:
        words[0] += f" {encoder.chat_words}"
    for sample in itertools.islice(samples, LOOKED_AT):
        if encoder is not None:
            encoder.encode(sample)
    if encoder is not None and encoder.reads_bytes:
        words.append("read as bytes, without a tokenizer")
    if samples.split:
        words.append(samples.split)
    if workload.packing:
        return DataFacts(words="; ".join(words))
    lengths = [len(ids) for ids in sample_ids(workload, samples)]
    if not lengths:
        raise UsageError(f"`dataset={workload.dataset}` has no sample of two tokens or more")
    words.append(f"samples padded to the longest of their micro-batch, cut at {workload.seq_len} tokens")
    if len(lengths) == MOST_SAMPLES:
        words.append(f"the first {MOST_SAMPLES} samples")
    return DataFacts(
        words="; ".join(words),
        mean_tokens=sum(lengths) / len(lengths),
        shortest_sample=min(lengths),
        longest_sample=max(lengths),
    )


def main() -> None:
    answer = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    fields: dict[str, Any] = json.load(sys.stdin)
    try:
        found: dict[str, Any] = {"facts": dataclasses.asdict(look_at(HuggingFaceWorkload.from_json(fields)))}
    except DsTuneError as error:
        found = {"refused": str(error), "usage": isinstance(error, UsageError)}
    os.write(answer, json.dumps(found).encode())


if __name__ == "__main__":
    main()
