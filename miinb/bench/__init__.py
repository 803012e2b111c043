"""Benchmarks: workloads, records, cost and charts."""
