"""Ledger: the records that a batch job has completed, on disk."""

from engine.batch.ledger.ledger import Ledger
from engine.batch.ledger.shard_file import (
    ShardWriter,
    encode,
    encode_record,
    scan_shard,
    shard_path,
    shards_dir,
)
