"""What is measured, and how it is told: used by the command line, benchmarks/ and scripts/.

A Bench (benches.py: ops; network_benches.py: networks) checks its numbers (numbers.py) before it is timed beside its
peers (peers.py) and the device's limits (ceilings.py), in a process of its own (worker.py). results.py saves and loads
rows, facts.py says where they were measured, and report/ makes tables and plots of them.
"""
