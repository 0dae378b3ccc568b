"""Myelin trains and serves models inside attested enclaves."""
