"""What scripts/bench_serving and scripts/bench_tune are made of. The client is standard library only, to stay light."""
