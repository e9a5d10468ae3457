"""A server under a load that comes in bursts: fixed levels against the controller."""
