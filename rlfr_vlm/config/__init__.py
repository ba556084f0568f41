"""The configuration of every command: one tree of frozen, validated sections. Every field says
what it does, in which unit, and where its default is from.
"""

from rlfr_vlm.config.algorithm import (
    AlgorithmConfig,
    EntropyShapingConfig,
    FlowRLConfig,
    KlConfig,
    LikelihoodShapingConfig,
    ShapingConfig,
    TokenRewardConfig,
    ValueConfig,
)
from rlfr_vlm.config.base import Section, parse_yaml
from rlfr_vlm.config.data import DataConfig, GraderConfig, RewardConfig
from rlfr_vlm.config.evaluation import EndpointConfig, EvalConfig, JudgeConfig
from rlfr_vlm.config.flow import (
    FlowConfig,
    FlowFitConfig,
    FlowNetworkConfig,
    FlowOnlineConfig,
    FlowRewardConfig,
)
from rlfr_vlm.config.model import DeepSpeedConfig, LoraConfig, ModelConfig, RayConfig
from rlfr_vlm.config.read import config_hash, differences, load_config, parse_config, to_yaml
from rlfr_vlm.config.rollout import RolloutConfig, VllmConfig
from rlfr_vlm.config.training import MonitorsConfig, OptimConfig, TrainConfig
from rlfr_vlm.config.tree import Config

__all__ = [
    "AlgorithmConfig",
    "Config",
    "DataConfig",
    "DeepSpeedConfig",
    "EndpointConfig",
    "EntropyShapingConfig",
    "EvalConfig",
    "FlowConfig",
    "FlowFitConfig",
    "FlowNetworkConfig",
    "FlowOnlineConfig",
    "FlowRLConfig",
    "FlowRewardConfig",
    "GraderConfig",
    "JudgeConfig",
    "KlConfig",
    "LikelihoodShapingConfig",
    "LoraConfig",
    "ModelConfig",
    "MonitorsConfig",
    "OptimConfig",
    "RayConfig",
    "RewardConfig",
    "RolloutConfig",
    "Section",
    "ShapingConfig",
    "TokenRewardConfig",
    "TrainConfig",
    "ValueConfig",
    "VllmConfig",
    "config_hash",
    "differences",
    "load_config",
    "parse_config",
    "parse_yaml",
    "to_yaml",
]
