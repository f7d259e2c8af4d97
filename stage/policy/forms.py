"""The two layouts of a checkpoint by name, and how large its files are. Nothing heavy is imported here."""

from __future__ import annotations

TRANSFORMERS, MULTI_MODALITY = "transformers", "multi_modality"
SHARD_BYTES = 2 * 2**30
