"""Measurements that write rows to benchmarks/results, each with its device, versions and date."""
