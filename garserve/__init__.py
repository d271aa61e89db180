"""garserve: the deployment runtime for Grasp Any Region models."""
