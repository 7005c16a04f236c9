"""Shared by all checkpoint formats.

format        Format, the contract of a checkpoint format
model_source  ModelSource, a stored model that is read parameter by parameter; loading it onto devices
rules         the mapping between foreign tensors and lcx parameters, with their layouts
relaid        a view of a stored model with its layers selected or regrouped into other stages
"""
