"""Benchmarks: the registry of ops and their peers, the runner, and the demo's ablations. Not in the wheel."""
