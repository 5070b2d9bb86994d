"""A network for deployment: recorded once for a shape (record.py), its steps joined into programs for the CPU's native
library (lower.py) or captured as CUDA graphs (graph.py), and run without Python between them (optimized.py)."""
