"""What scripts/bench_serving, scripts/bench_spec and scripts/bench_tune are made of.

The client is standard library only, to stay light.
"""
