"""Benchmarks: `python -m bench` for the main job, `python -m bench.linear` and its like for one table each."""
