"""Where people label: a page in a process of its own, which the learner reaches over HTTP."""
