"""Cost: seconds of an op as a function of SMs and bandwidth."""
