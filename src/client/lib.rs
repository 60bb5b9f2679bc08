//! The command-line CRI client and the benchmark.
