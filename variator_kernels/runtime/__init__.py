"""When a method applies: the context of one forward, and the level that holds in it."""
