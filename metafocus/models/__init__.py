"""A causal language model and its tokenizer: loaded, or a small one made from scratch."""

from __future__ import annotations

from metafocus.models.loading import check_fits as check_fits
from metafocus.models.loading import described as described
from metafocus.models.loading import load as load
from metafocus.models.loading import load_tokenizer as load_tokenizer
from metafocus.models.scratch import small as small
