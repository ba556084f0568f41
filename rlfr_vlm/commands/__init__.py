"""What each verb of the command line does, as functions of a config: build the parts, run, take
them down.
"""

from rlfr_vlm.commands.evaluate import evaluate, evaluate_benchmarks, run_evaluation
from rlfr_vlm.commands.fields import export_flow, identity_from_config, import_flow
from rlfr_vlm.commands.fit import Sampled, fit, flow, needs_responses, sampled_for_fit
from rlfr_vlm.commands.parts import Workbench, say, workbench
from rlfr_vlm.commands.rows import (
    bad_rows_of,
    checked,
    encode_heldout,
    expert_prompts,
    forget_bad_rows,
    heldout_prompts,
    required_data,
    rl_prompts,
)
from rlfr_vlm.commands.train import run_training, train, train_rank

__all__ = [
    "Sampled",
    "Workbench",
    "bad_rows_of",
    "checked",
    "encode_heldout",
    "evaluate",
    "evaluate_benchmarks",
    "expert_prompts",
    "export_flow",
    "fit",
    "flow",
    "forget_bad_rows",
    "heldout_prompts",
    "identity_from_config",
    "import_flow",
    "needs_responses",
    "required_data",
    "rl_prompts",
    "run_evaluation",
    "run_training",
    "sampled_for_fit",
    "say",
    "train",
    "train_rank",
    "workbench",
]
