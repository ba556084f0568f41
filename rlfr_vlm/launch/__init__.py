"""The processes of a run: ranks and engines placed, started, watched and started again."""
