"""How a model is held and computed in less memory: quantised weights, block swap, activations, attention, optimizers.

Nothing in here knows a family: what differs between models are facts of its record (`blocks`,
`Part.high_precision`, `Part.precision_options`).
"""
