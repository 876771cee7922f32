"""Who writes the responses: the policy in this process, or servers."""
