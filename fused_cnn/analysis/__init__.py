"""What a network is made of and what running it costs: layer tables, kernel launches, memory traffic."""

from .summary import Summary, reduction, summary
from .traffic import Counts, count, minimum_traffic, saved_bytes

__all__ = ["Counts", "Summary", "count", "minimum_traffic", "reduction", "saved_bytes", "summary"]
