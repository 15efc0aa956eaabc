"""Observe: plans and timelines for people (terminal, Perfetto, HTML)."""
