"""Published algorithms, each a function that fills the slots of an agent."""
