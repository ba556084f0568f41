"""`rlfr-vlm validate`: every row of the data as training would read it, before a run depends on it.

`examine` looks at one row with the reader and the renderer of training, `workers` does so in
processes that may die, `scan` puts the rows of a file together (repeats, overlap, gold answers),
`show` and `files` say what was found.
"""
