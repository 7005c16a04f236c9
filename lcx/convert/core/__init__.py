"""What every format builds on.

format        Format, the contract of a checkpoint format
model_source  ModelSource, a stored model that is read parameter by parameter, and its way onto devices
rules         which foreign tensors are which parameters, in which layout
relaid        a stored model as another one with the same layers
"""
