"""Bad input, one table: see catalogue.py."""

from __future__ import annotations

ADAPTERS = [
    (
        "layer fraction is a number of layers",
        'mf.top_layers(4, ("up_proj",))',
        "PlacementError",
        ("top_layers(fraction=4) must lie in [0, 1]: it is the share of layers, not their number"),
    ),
    (
        "layer fraction is a word",
        'mf.top_layers("0.5", ("up_proj",))',
        "PlacementError",
        (
            "top_layers(fraction='0.5') must lie in [0, 1]: it is the share of layers, not "
            "their number"
        ),
    ),
    (
        "layer fraction is True",
        'mf.top_layers(True, ("up_proj",))',
        "PlacementError",
        (
            "top_layers(fraction=True) must lie in [0, 1]: it is the share of layers, not "
            "their number"
        ),
    ),
    (
        "layer fraction is NaN",
        'mf.top_layers(math.nan, ("up_proj",))',
        "PlacementError",
        (
            "top_layers(fraction=nan) must lie in [0, 1]: it is the share of layers, not "
            "their number"
        ),
    ),
    (
        "names are one string",
        'mf.top_layers(0.5, "up_proj")',
        "PlacementError",
        (
            "top_layers(names='up_proj') must be a non-empty tuple of module names, such as "
            "('gate_proj', 'up_proj')"
        ),
    ),
    (
        "no names",
        "mf.top_layers(0.5, ())",
        "PlacementError",
        (
            "top_layers(names=()) must be a non-empty tuple of module names, such as "
            "('gate_proj', 'up_proj')"
        ),
    ),
    (
        "a name that no layer has",
        'mf.top_layers(0.5, ("gate",))(model())',
        "PlacementError",
        (
            "top_layers: no module in a layer of Qwen2ForCausalLM is named ['gate']; its "
            "linear modules are ['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj', "
            "'self_attn.o_proj', 'mlp.gate_proj', 'mlp.up_proj', 'mlp.down_proj']"
        ),
    ),
    (
        "a model without layers",
        'mf.top_layers(0.5, ("0",))(linear)',
        "PlacementError",
        (
            "top_layers: no module in a layer of Sequential is named ['0']; its linear "
            "modules are ['0', '2']"
        ),
    ),
    (
        "a pattern that is no regular expression",
        'mf.matching("(")',
        "PlacementError",
        (
            "matching('(') is no regular expression: missing ), unterminated subpattern at "
            "position 0"
        ),
    ),
    (
        "a pattern of no type",
        "mf.matching(None)",
        "PlacementError",
        (
            "matching(None) is no regular expression: first argument must be string or "
            "compiled pattern"
        ),
    ),
    (
        "a pattern that matches nothing",
        'mf.matching("up_proj")(linear)',
        "PlacementError",
        (
            "matching('up_proj') matches the whole path of no linear module of Sequential; "
            "paths are like ['0', '2']"
        ),
    ),
    (
        "no linear module",
        "mf.all_linear(nn.Sequential(nn.Tanh()))",
        "PlacementError",
        "all_linear: Sequential has no linear module besides its output head",
    ),
    (
        "placement is a name",
        'mf.LoRA("up_proj")',
        "PlacementError",
        (
            "LoRA(where='up_proj') must be a placement, a function from a model to module "
            "paths, such as top_layers(0.35, ('up_proj',)) or matching('.*up_proj')"
        ),
    ),
    (
        "placement is a tuple of names",
        'mf.FullWeights(("up_proj",))',
        "PlacementError",
        (
            "FullWeights(where=('up_proj',)) must be a placement, a function from a model to "
            "module paths, such as top_layers(0.35, ('up_proj',)) or matching('.*up_proj')"
        ),
    ),
    (
        "placement returns one string",
        ('place = mf.LoRA(lambda model: "10")\nplace.init(linear)'),
        "PlacementError",
        "LoRA: the placement returned '10'; it must return a tuple of module paths",
    ),
    (
        "placement returns nothing",
        "mf.LoRA(lambda model: None).init(linear)",
        "PlacementError",
        "LoRA: the placement returned None; it must return a tuple of module paths",
    ),
    (
        "a module that cannot be adapted",
        'mf.LoRA(mf.top_layers(0.25, ("input_layernorm",))).init(model())',
        "PlacementError",
        (
            "LoRA: module 'model.layers.3.input_layernorm' is a Qwen2RMSNorm, which cannot "
            "be adapted; place LoRA on linear layers (nn.Linear, transformers Conv1D)"
        ),
    ),
    (
        "rank of zero",
        "mf.LoRA(mf.all_linear, rank=0)",
        "ProblemError",
        "LoRA: rank must be an integer >= 1, got 0.",
    ),
    (
        "rank is no whole number",
        "mf.LoRA(mf.all_linear, rank=8.0)",
        "ProblemError",
        "LoRA: rank must be an integer >= 1, got 8.0.",
    ),
    (
        "rank that fills the memory",
        "mf.LoRA(mf.all_linear, rank=1_000_000_000)",
        "ProblemError",
        "LoRA(rank=1000000000) must be at most 65536: no layer is that wide",
    ),
    (
        "alpha NaN",
        "mf.LoRA(mf.all_linear, alpha=math.nan)",
        "ProblemError",
        "LoRA: alpha must be a finite number, got nan.",
    ),
    (
        "alpha is a word",
        'mf.LoRA(mf.all_linear, alpha="64")',
        "ProblemError",
        "LoRA: alpha must be a finite number, got '64'.",
    ),
    (
        "fast weights of another model",
        ("with lora.bind(model(), mf.LoRA(mf.all_linear, rank=1).init(linear)):\n    pass"),
        "ProblemError",
        (
            "LoRA: fast weights of another model or placement: missing "
            "['model.layers.2.mlp.up_proj.lora_A', 'model.layers.2.mlp.up_proj.lora_B', "
            "'model.layers.3.mlp.up_proj.lora_A', 'model.layers.3.mlp.up_proj.lora_B'] (4), "
            "unknown ['0.lora_A', '0.lora_B', '2.lora_A', '2.lora_B'] (4); make them with "
            "init(model) of this adapter"
        ),
    ),
    (
        "fast weights are a list",
        ("with lora.bind(model(), [torch.ones(2)]):\n    pass"),
        "ProblemError",
        "LoRA: fast weights are a dict of tensors, got list; make them with init(model)",
    ),
    (
        "fast weights are integers",
        (
            "fast = {name: value.long() for name, value in lora.init(model()).items()}\n"
            "with lora.bind(model(), fast):\n"
            "    pass"
        ),
        "ProblemError",
        (
            "LoRA: 'model.layers.2.mlp.up_proj.lora_A' is a torch.int64; fast weights are "
            "floating-point tensors"
        ),
    ),
    (
        "fast weights of another rank",
        ("with lora.bind(model(), mf.LoRA(lora.where, rank=3).init(model())):\n    pass"),
        "ProblemError",
        (
            "LoRA: 'model.layers.2.mlp.up_proj.lora_A' has shape [3, 32], expected [2, 32], "
            "or that behind the number of examples"
        ),
    ),
    (
        "fast weights for three rows and a batch of two",
        (
            "from metafocus.adapters import for_each\n"
            "lm = mf.lm_loss(model(), adapter=lora, mask=masks.causal)\n"
            "lm(for_each(lora.init(model()), 3), {}, batch())"
        ),
        "ProblemError",
        (
            "Linear has fast weights for each of 3 examples, but its input has shape [2, 12, "
            "32] and not [3, ..., 32]: bind fast weights made for this batch, and only on "
            "modules that see whole sequences (not the output head, not experts that tokens "
            "are routed to)"
        ),
    ),
    (
        "a PEFT configuration as a dict",
        'mf.LoRA.from_peft({"r": 8})',
        "ProblemError",
        ("LoRA.from_peft takes a peft.LoraConfig, got dict; from a dict: LoraConfig(**options)"),
    ),
    (
        "a PEFT option that LoRA has not",
        (
            "from peft import LoraConfig\n"
            'mf.LoRA.from_peft(LoraConfig(target_modules=["up_proj"], use_dora=True))'
        ),
        "ProblemError",
        (
            "LoRA.from_peft: {'use_dora': True} changes what is trained or computed, and "
            "LoRA here has no such option; reset it to PEFT's default"
        ),
    ),
    (
        "a PEFT configuration without modules",
        ("from peft import LoraConfig\nmf.LoRA.from_peft(LoraConfig())"),
        "ProblemError",
        (
            "LoRA.from_peft: target_modules=None leaves the choice to PEFT's table of "
            "models; name the modules, or pass 'all-linear'"
        ),
    ),
    (
        "full weights of nothing, saved",
        "mf.FullWeights(lambda model: ()).save(linear, {}, folder)",
        "PlacementError",
        "FullWeights.save: the placement is empty, nothing to save",
    ),
]
