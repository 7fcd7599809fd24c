"""The pieces of `bench_quality.py`: what a packed cache loses, and what would lose less."""
