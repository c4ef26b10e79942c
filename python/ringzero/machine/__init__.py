"""How a machine is described, put together, started and talked to."""
