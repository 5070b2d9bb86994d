"""What a network is made of and what running it costs: layer tables, kernel launches, memory traffic."""

from .summary import Summary, reduction, summary
from .traffic import BlockTraffic, Counts, MinimumTraffic, OpCounts, count, minimum_traffic, saved_bytes

__all__ = [
    "BlockTraffic",
    "Counts",
    "MinimumTraffic",
    "OpCounts",
    "Summary",
    "count",
    "minimum_traffic",
    "reduction",
    "saved_bytes",
    "summary",
]
