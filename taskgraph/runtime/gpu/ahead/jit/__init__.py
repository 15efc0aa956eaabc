"""Triton functions. Importing a module of this folder needs Triton; every change here makes all cubins anew."""
