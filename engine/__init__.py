"""ExactOBS on a layer, and on all of a network's: Hessian, elimination, memory, processes."""
