"""The HTML page of a run.

`run_files` reads a run folder, `rollout_data` packs its rollouts, `html` writes the page; the views are the .html, .css and .js files.
"""
