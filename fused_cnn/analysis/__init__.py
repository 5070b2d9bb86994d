"""What a network is made of and what running it costs: layer tables, kernel launches, memory traffic."""

from .minimum import BlockTraffic, MinimumTraffic, minimum_traffic
from .reductions import reduction
from .summary import Summary, summary
from .traffic import Counts, OpCounts, count, saved_bytes

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
