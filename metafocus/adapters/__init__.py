"""Adapters: where fast weights go (placements), what they are, and how a model sees them."""

from metafocus.adapters.full_weights import FullWeights as FullWeights
from metafocus.adapters.lora import LoRA as LoRA
from metafocus.adapters.low_rank import for_each as for_each
from metafocus.adapters.low_rank import one_of as one_of
from metafocus.adapters.placement import Placement as Placement
from metafocus.adapters.placement import all_linear as all_linear
from metafocus.adapters.placement import matching as matching
from metafocus.adapters.placement import top_layers as top_layers
from metafocus.adapters.protocol import Adapter as Adapter
from metafocus.adapters.slots import bound as bound
from metafocus.adapters.slots import functions as functions
from metafocus.adapters.slots import rebind as rebind
