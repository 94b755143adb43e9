"""Linen models of the papers, and the pure functions made from them."""

from ehap_jax.models.functions import eval_apply as eval_apply
from ehap_jax.models.functions import init_variables as init_variables
from ehap_jax.models.functions import train_apply as train_apply
from ehap_jax.models.preresnet import PreResNet as PreResNet
from ehap_jax.models.resnet import ResNet as ResNet
from ehap_jax.models.vgg import VGG as VGG
from ehap_jax.models.wideresnet import WideResNet as WideResNet
from ehap_jax.models.zoo import known_models as known_models
from ehap_jax.models.zoo import make_model as make_model
