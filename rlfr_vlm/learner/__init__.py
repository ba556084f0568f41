"""What learns: the policy, its heads and the flow field with their optimisers, in one process or
sharded, in step.
"""
