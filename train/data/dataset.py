"""The rows of a run: found, hashed, tokenised into the cache, divided into training and evaluation.

>>> found = find_data(config)                 # reads the files' bytes, no row
>>> data = tokenise(found, config, Encoder.load(base.folder), home, limit=40960)
>>> len(data.rows), len(data.eval_rows)
(1000, 100)
"""

import hashlib
from dataclasses import dataclass, replace

from loraport.clients.errors import ConfigError
from loraport.clients.home import Home
from loraport.clients.rows import Source, find_source, hash_source
from loraport.train.config import RunConfig
from loraport.train.data.split import split, spread
from loraport.train.data.store import Subset, TokenStore, open_store, refuse_long
from loraport.train.data.tokens import Encoder
from loraport.train.defaults import Facts
from loraport.train.manifest import DataCounts


@dataclass(frozen=True)
class Found:
    """The files of a run, and the hash of each set's bytes."""

    source: Source
    sha256: str
    eval_source: Source | None
    eval_sha256: str

    @property
    def both_sha256(self) -> str:
        """Hash of all data of the run."""
        return hashlib.sha256(f"{self.sha256} {self.eval_sha256}".encode()).hexdigest()


@dataclass(frozen=True)
class Data:
    """Tokenised rows. `encoder`: with the template's switches as the adapter is to be served with."""

    found: Found
    encoder: Encoder
    rows: Subset
    eval_rows: Subset
    notes: tuple[str, ...]

    def add_to(self, facts: Facts) -> Facts:
        """`facts` of the base with those of the data."""
        return replace(
            facts,
            rows=len(self.rows),
            tokens=int(self.rows.lengths.sum()),
            trained_tokens=int(self.rows.trained.sum()),
            longest=max(int(rows.longest_sequences.max()) for rows in (self.rows, self.eval_rows)),
            eval_rows=len(self.eval_rows),
        )

    def counts(self) -> DataCounts:
        """What was trained on, for the manifest."""
        sources = [source for source in (self.found.source, self.found.eval_source) if source]
        return DataCounts(
            files=[source.name for source in sources],
            sha256=self.found.both_sha256,
            rows=len(self.rows),
            tokens=int(self.rows.lengths.sum()),
            trained_tokens=int(self.rows.trained.sum()),
            eval_rows=len(self.eval_rows),
        )


def find_data(config: RunConfig) -> Found:
    """The files that a configuration names; UsageError where there are none."""
    source = find_source(str(config.data))
    eval_source = find_source(str(config.eval_data)) if config.eval_data else None
    return Found(source, hash_source(source), eval_source, hash_source(eval_source) if eval_source else "")


def tokenise(found: Found, config: RunConfig, encoder: Encoder, home: Home, limit: int) -> Data:
    """Rows of at most `limit` tokens; without evaluation data a part of the training rows is held out.

    DataError at the first row that the method cannot be trained on, ConfigError where nothing is left to train on.
    """
    store = open_store(found.source, config.format, encoder, home, found.sha256, config.method)
    refuse_long(store, limit)
    if found.eval_source:
        eval_store = open_store(found.eval_source, config.format, encoder, home, found.eval_sha256, config.method)
        refuse_long(eval_store, limit)
        rows, eval_rows = store.subset(range(len(store))), eval_store.subset(spread(len(eval_store), config.eval_rows))
    else:
        training, held_out = split(store.groups, config.eval_fraction, config.eval_rows)
        if not len(training):
            raise ConfigError(
                f"{config.data} has only one question, in {len(store)} rows.", "add rows, or give --eval-data"
            )
        rows, eval_rows = store.subset(training), store.subset(held_out)
    thinking = int(store.about["thinking_rows"])
    return Data(found, encoder.for_data(thinking, len(store)), rows, eval_rows, notes_on(store, encoder, thinking))


def notes_on(store: TokenStore, encoder: Encoder, thinking: int) -> tuple[str, ...]:
    """What a user should know about how the rows are rendered."""
    notes = [store.source.note, encoder.explain(thinking, len(store))]
    if store.about["untrained_turns"]:
        notes.append(
            f"{store.about['untrained_turns']} assistant turns before the last of their row carry no loss: the chat "
            f"template renders them differently once others follow. Split those rows to train on each."
        )
    return tuple(note for note in notes if note)
