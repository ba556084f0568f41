"""The HTML pages of a run and of an evaluation.

`run_files` reads a run folder, `rollout_data` packs its rollouts, `findings` says what they mean
(`events`, `flow_health`, `flow_tokens`, `latents`), `html` writes the page; `evaluation` reads
benchmark folders and `evaluation_page` writes theirs; `template` and `pictures` serve both. The
views are the .html, .css and .js files of `web`; `scripts` joins the last.
"""
