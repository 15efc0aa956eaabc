"""Solvers: each finds assignments of a Problem's ops to lanes and SMs; the planner judges them with one clock."""
