"""Secure aggregation: the server learns the sum of many clients' rows, and no row."""
