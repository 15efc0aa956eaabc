"""Observe: plans and timelines for people (terminal, Perfetto, HTML)."""

from taskgraph.observe.explain import lane_place, remark, verdict_sentence
