"""Actor-critics, and the specs that build them."""

from esper_lightning.policies.actor_critic import ActorCritic, build_actor_critic
from esper_lightning.policies.base import Evaluation, Policy, PolicySpec, SampledAction
from esper_lightning.policies.composed import Composed, Imported
from esper_lightning.policies.convolutional import CNN
from esper_lightning.policies.encoders import Encoder, EncoderSpec, Flat, Groups
from esper_lightning.policies.feedforward import MLP
from esper_lightning.policies.images import Image
from esper_lightning.policies.recurrent import Recurrent

__all__ = [
    "CNN",
    "MLP",
    "ActorCritic",
    "Composed",
    "Encoder",
    "EncoderSpec",
    "Evaluation",
    "Flat",
    "Groups",
    "Image",
    "Imported",
    "Policy",
    "PolicySpec",
    "Recurrent",
    "SampledAction",
    "build_actor_critic",
]
