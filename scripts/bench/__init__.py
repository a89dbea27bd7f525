"""What scripts/bench_serving is made of. Standard library only, so that the client stays light."""
