"""Samplers under diffusers' names: each builds a table of affine steps, executed by one fused op."""

from .ddim import DDIMScheduler
from .ddpm import DDPMScheduler
from .dpmsolver_multistep import DPMSolverMultistepScheduler
from .euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from .euler_discrete import EulerDiscreteScheduler
from .flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from .scheduler import Scheduler, StepOutput
from .table import StepTable

__all__ = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "Scheduler",
    "StepOutput",
    "StepTable",
]
