"""Project scheduling (RCPSP, MRCPSP): what small graphs are solved and bounded by."""
