"""What can be measured, by name. Nothing heavy is imported here, so that `--help` answers at once."""

from __future__ import annotations

# Language models of deepseek-ai/Janus-Pro-1B and -7B (config.json, language_config); `tiny` tries the path on a CPU.
LANGUAGE: dict[str, dict[str, int]] = {
    "tiny": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128),
    "1b": dict(hidden_size=2048, num_hidden_layers=24, num_attention_heads=16, intermediate_size=5632),
    "7b": dict(hidden_size=4096, num_hidden_layers=30, num_attention_heads=32, intermediate_size=11008),
}
SHIPPED = "shipped"  # the trained tiny Janus of the package
REWARDS = ("hps", "git", "gdino")  # of `stage.speed.rewards`
