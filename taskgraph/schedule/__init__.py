"""Plan: from a Graph and a Device to a Plan, its bounds and its verdict."""
