"""Benchmarks: they print tables and write build/bench.json; nothing here is a test."""
