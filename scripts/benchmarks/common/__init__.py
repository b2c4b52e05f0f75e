"""Parts of benchmark_op.py and benchmark_training.py."""
