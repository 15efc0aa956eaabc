"""Where the ranks of a model are: processes of this machine, or actors on a Ray cluster."""
