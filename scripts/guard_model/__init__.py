"""Data, splits and training of the guard's classifier, for scripts/train_guard and scripts/bench_guard."""
