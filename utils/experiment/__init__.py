"""A run: flags, rows, records, tables, report."""
