"""A `StudySummary` as text, tables, JSON and files."""
